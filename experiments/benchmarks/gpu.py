"""Updates and annealed importance sampling on a GPU, against what its products and memory reach."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from experiments.benchmarks.cases import Annealing, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.memory import peak_memory
from experiments.benchmarks.timing import median_seconds
from experiments.command import CommandError

_PRECISIONS = {"fp32": "highest", "TF32": "high"}
_UPDATE, _AIS = Sizes(), Sizes(rows=20_000, mh_steps=10, leapfrogs=10)
_REPEATS = 7

Work = SamplerUpdate | Annealing


def gpu(
    device: str = "cuda", update: Sizes = _UPDATE, ais: Sizes = _AIS, square: int = 8192
) -> dict[str, Any]:
    """Time updates and AIS in fp32 and TF32: eager, compiled, each also captured as a CUDA graph.

    Arguments:
        device: On another one than a GPU nothing is captured.
        update: Sizes of a sampler update, by default the paper's.
        ais: Sizes of AIS, by default 20 chains for each of 1,000 images, as in the paper, and a
            thousandth of its transitions.
        square: Rows of the square matrices that show what the device reaches.

    Raises:
        CommandError: There is no GPU here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("benchmark gpu: there is no CUDA GPU here; run it where there is one")
    bandwidth = _bandwidth(device, square)
    reached, rows = {"bytes a second": bandwidth}, []
    for precision, setting in _PRECISIONS.items():
        with _products_in(setting):
            rate = _product_rate(device, square)
            reached |= {
                f"{precision}, FLOP a second": rate,
                f"{precision}, largest error of U in nats": energy_error(device, update),
            }
            for name, work, run in _ways(device, update, ais):
                figures = _figures(work, run, rate, bandwidth)
                rows.append({"work": f"{name}, {precision}", **figures})
    return {
        "title": f"update {update.mh_steps} × {update.leapfrogs}, {update}; AIS {ais.mh_steps} × "
        f"{ais.leapfrogs}, {ais.rows} rows",
        "rows": rows,
        "reached": reached,
        "note": "shares: the decoder's matrix products alone, of what the device reached: "
        + ", ".join(f"{what} {figure:.3g}" for what, figure in reached.items()),
    }


def _ways(
    device: str, update: Sizes, ais: Sizes
) -> Iterator[tuple[str, Work, Callable[[], object]]]:
    """Yield each work in each way, after asserting that it does not wait for the device."""
    for compile in (False, True):
        how = "compiled" if compile else "eager"
        for name, work in (
            ("update", SamplerUpdate(update, compile, device=device)),
            ("AIS", Annealing(ais, compile, device)),
        ):
            yield f"{name}, {how}", work, work
            if device == "cuda":
                _check_no_wait(work)
                yield f"{name}, {how} and captured", work, _captured(work)


def _check_no_wait(work: Work) -> None:
    """Raise RuntimeError where the host waits for the device inside the work."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(work: Work) -> Callable[[], object]:
    """Return the replay of the work as one CUDA graph, with other noise each time."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work(generator)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(generator)
    return graph.replay


def _figures(
    work: Work, run: Callable[[], object], rate: float, bandwidth: float
) -> dict[str, float]:
    sizes, seconds = work.sizes, median_seconds(run, _REPEATS)
    # To second order, each gradient comes with a Hessian-vector product, as many products again.
    passes = sizes.gradients * (2 if isinstance(work, SamplerUpdate) else 1)
    widths = [sizes.latent_dim, *sizes.hidden, work.case.x.shape[1]]
    moved = sizes.weights + sizes.rows * (2 * sum(widths) - widths[0] - widths[-1])
    return {
        "milliseconds": 1e3 * seconds,
        "microseconds_a_gradient_of_all_rows": 1e6 * seconds / sizes.gradients,
        "share_of_product_rate": 4 * passes * sizes.rows * sizes.weights / seconds / rate,
        "share_of_bandwidth": 2 * 4 * passes * moved / seconds / bandwidth,
        "peak_mebibytes": peak_memory(run),
    }


@contextmanager
def _products_in(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_rate(device: str, square: int) -> float:
    """Return the FLOP a second of a large matrix product."""
    left, right, room = torch.randn(3, square, square, device=device)
    return 2 * square**3 / median_seconds(lambda: torch.mm(left, right, out=room), _REPEATS)


def _bandwidth(device: str, square: int) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source, room = torch.randn(2, square, square, device=device)
    return 2 * 4 * square**2 / median_seconds(lambda: room.copy_(source), _REPEATS)


@torch.no_grad()
def energy_error(device: str, sizes: Sizes) -> float:
    """Return the largest error of U against float64 over all rows, nats."""
    case = Posterior(sizes, device)
    single = case.model.energy(case.x)(case.z)
    double = case.model.double().energy(case.x.double())(case.z.double())
    return float((single - double).abs().max())
