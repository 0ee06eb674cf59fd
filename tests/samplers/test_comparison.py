import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    TARGETS,
    Endpoint,
    Energy,
    Kernel,
    PhasePoint,
    Preconditioned,
    Turns,
    compare,
    sample,
    seeded_generator,
    summarise,
    value_and_gradient,
)
from samplers.comparison import efficiency, race, tune_hmc


def normal(position: Tensor) -> Tensor:
    return 0.5 * position.square().sum(dim=-1)


def test_a_comparison_counts_what_a_step_costs_and_has_a_row_for_each_kernel() -> None:
    start = torch.randn(50, 2, generator=seeded_generator("cpu", 0))
    kernels = {"short": HMC(1, 1.4), "both": Turns([HMC(2, 0.7), HMC(3, 0.7)])}
    table = compare(kernels, normal, start, 300, generator=seeded_generator("cpu", 1))
    assert table["sampler"] == list(kernels)
    assert table["gradients_per_step"] == [1, 5]
    assert {len(column) for column in table.values()} == {2}
    draws = sample(kernels["short"], normal, start, 300, generator=seeded_generator("cpu", 1)).draws
    worst = min(summarise(each).ess_bulk.min().item() for each in (draws, draws.square()))
    row = table.row("short")
    assert row["ess_per_gradient"] == pytest.approx(worst / 15_000)
    assert row["ess_per_second"] == pytest.approx(worst / row["seconds"])
    assert row["r_hat"] == pytest.approx(
        max(summarise(each).r_hat.max().item() for each in (draws, draws.square()))
    )
    assert row["stuck"] == 0
    assert all(name in str(table) for name in (*kernels, "ESS/gradient"))


def test_chains_that_mislead_are_told_of() -> None:
    start = torch.randn(50, 1, generator=seeded_generator("cpu", 0))

    class Mirror(HMC):
        """Leaps to the mirror image, and hardly beyond."""

        def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
            position = -start.state.position + 0.05 * start.momentum
            end = value_and_gradient(energy, position)
            return Endpoint(end, start.momentum, torch.zeros_like(end.energy))

    with pytest.warns(
        UserWarning, match=r"R̂ > 1.01, of slow \(\d.*more slowly .* of mirror, which"
    ):
        compare({"slow": HMC(1, 0.01), "mirror": Mirror(1, 1.0)}, normal, start, 400)
    compare({"good": HMC(1, 1.4)}, normal, start, 400)


def test_what_cannot_be_compared_is_refused() -> None:
    for kernels, chains, draws in (({}, 4, 4), ({"a": HMC()}, 3, 4), ({"a": HMC()}, 4, 3)):
        message = f"got {len(kernels)}, {chains} and {draws}$"
        with pytest.raises(ValueError, match=message):
            compare(kernels, normal, torch.zeros(chains, 2), draws)
    assert compare({"arrays": HMC(1, 1.4)}, normal, torch.randn(50, 2).numpy(), 400)["ess"][0] > 0.1
    with pytest.raises(ValueError, match=r"shape \(chains, dim\), got \(2,\)"):
        compare({"a": HMC()}, normal, torch.zeros(2), 4)


def test_the_worst_coordinate_is_among_the_suspects() -> None:
    noise = torch.randn(20, 400, 3, generator=seeded_generator("cpu", 0))
    draws = [noise[:, 0]]
    for innovation in noise[:, 1:].unbind(dim=1):
        draws.append(torch.tensor([0.9, -0.5, 0.3]) * draws[-1] + innovation)
    draws = torch.stack(draws, dim=1)
    assert efficiency(draws, 1) == pytest.approx(efficiency(draws))


class Stuck(Kernel):
    """HMC some of whose chains never move."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.num_leapfrogs, self.share = 1, share
        self.register_buffer("log_step_size", torch.zeros(()))

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        end = HMC(1, 1.4).integrate(start, energy)
        stuck = torch.arange(len(start.momentum)) < self.share * len(start.momentum)
        return end._replace(log_determinant=end.log_determinant.masked_fill(stuck, torch.nan))


@pytest.mark.parametrize(
    ("first", "other", "best"),
    [
        (HMC(1, 1.4), HMC(1, 1.4), "first"),  # as good is not better
        (HMC(8, 0.3), HMC(1, 1.4), "other"),
        (HMC(1, 1.4), HMC(8, 0.3), "first"),
        (HMC(8, 0.3), Stuck(0.01), "first"),
    ],
)
def test_the_first_kernel_gives_way_only_to_a_surely_better_one(
    first: Kernel, other: Kernel, best: str
) -> None:
    start = torch.randn(100, 2, generator=seeded_generator("cpu", 0))
    found = race({"first": first, "other": other}, normal, start, 600, seeded_generator("cpu", 1))
    assert found.best == best
    assert found.converged


def test_chains_that_never_move_are_counted_and_do_not_converge() -> None:
    start = torch.randn(100, 2, generator=seeded_generator("cpu", 0))
    found = race({"stuck": Stuck(0.03)}, normal, start, 400, seeded_generator("cpu", 1))
    assert found.table.row("stuck")["stuck"] == 3
    assert not found.converged


def test_hmc_is_tuned_beyond_the_step_size_that_acceptance_asks_for() -> None:
    # One leapfrog of ε = 1.3, accepted half of the time, has .37 independent draws a gradient on
    # this target; of ε = 1 it has .24, and of two leapfrogs none has more than .27.
    target = TARGETS["rough_well"]()
    position = target.sample(100, seeded_generator("cpu", 0))
    warm = Preconditioned(HMC(5, 0.5), torch.zeros(2), torch.ones(2))
    generator = seeded_generator("cpu", 1)
    tuned = tune_hmc(warm, target, position, 150, generator, lengths=(1, 2, 5))
    assert tuned.num_leapfrogs == 1
    assert 1.15 < float(tuned.step_size) < 1.55
