"""Updates and annealed importance sampling on a GPU, against what its products and memory reach."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from experiments.benchmarks.cases import Annealing, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.timing import agree, device_name, median_seconds
from experiments.shared.cli import CommandError

_PRECISIONS = {"fp32": "highest", "TF32": "high"}
_UPDATE, _AIS = Sizes(), Sizes(rows=20_000, mh_steps=10, leapfrogs=10)
_REPEATS = 7
_LOGITS_STD = 4.0

Work = SamplerUpdate | Annealing


def gpu(
    device: str = "cuda", update: Sizes = _UPDATE, ais: Sizes = _AIS, square: int = 8192
) -> dict[str, Any]:
    """Time updates and AIS in fp32 and TF32: eager, compiled, each also captured as a CUDA graph.

    Arguments:
        device: On another one than a GPU nothing is captured, and memory is not measured.
        update: Sizes of a sampler update, by default the paper's.
        ais: Sizes of AIS, by default 20 chains for each of 1,000 images, as in the paper, and a
            thousandth of its transitions.
        square: Rows of the square matrices that show what the device reaches.

    Raises:
        CommandError: There is no GPU here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("benchmark gpu: there is no CUDA GPU here; run it where there is one")
    with _products_in(_PRECISIONS["fp32"]):
        checks = agreement(device, update, ais)
    bandwidth = _bandwidth(device, square)
    reached, rows = {"bytes a second": bandwidth}, []
    for precision, setting in _PRECISIONS.items():
        with _products_in(setting):
            rate = _product_rate(device, square)
            reached |= {
                f"{precision}, FLOP a second": rate,
                f"{precision}, largest error of U in nats, logits of a standard deviation of "
                f"{_LOGITS_STD:g}": energy_error(device, update),
            }
            for name, work, run, peak in _ways(device, update, ais):
                figures = _figures(work, run, rate, bandwidth)
                rows.append({"work": f"{name}, {precision}", **figures, "peak_mebibytes": peak})
    return {
        "title": f"update {update.mh_steps} × {update.leapfrogs}, {update}; AIS {ais.mh_steps} × "
        f"{ais.leapfrogs}, {ais.rows} rows",
        "device": device_name(device),
        "rows": rows,
        "reached": reached,
        "note": "shares: the decoder's matrix products alone, of what the device reached: "
        + ", ".join(f"{what} {figure:.3g}" for what, figure in reached.items())
        + f"; compiled and eager agree in fp32 to a relative {checks}",
    }


def agreement(device: str, update: Sizes, ais: Sizes) -> dict[str, float]:
    """Return by how much compiled and eager work differ, relative to its largest number.

    Raises:
        RuntimeError: They do not do the same work.
    """
    compiled, eager = (SamplerUpdate(update, each, device=device)() for each in (True, False))
    # The reciprocal loss multiplies rounding where a chain hardly moves, and a decision that
    # rounding turns moves a chain elsewhere.
    checks = agree("loss and gradient norm", compiled, eager, 0.1)
    compiled, eager = (Annealing(ais, each, device)() for each in (True, False))
    return checks | agree("log weight", compiled, eager, 1e-3)


def _ways(
    device: str, update: Sizes, ais: Sizes
) -> Iterator[tuple[str, Work, Callable[[], object], float]]:
    """Yield each work in each way and its memory, after asserting that it does not wait."""
    for compile in (False, True):
        how = "compiled" if compile else "eager"
        for name, work in (
            ("update", SamplerUpdate(update, compile, device=device)),
            ("AIS", Annealing(ais, compile, device)),
        ):
            work()  # the first time brings what is kept, such as compiled code
            if device != "cuda":
                yield f"{name}, {how}", work, work, math.nan
                continue
            yield f"{name}, {how}", work, work, peak_memory(work)
            _check_no_wait(work)
            yield f"{name}, {how} and captured", work, *captured(work)


def _check_no_wait(work: Work) -> None:
    """Raise RuntimeError where the host waits for the device inside the work."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(work: Callable[[torch.Generator], object]) -> tuple[Callable[[], object], float]:
    """Return the replay of the work as one CUDA graph, with other noise each time, and its memory.

    That is the peak of the capture, MiB: a replay takes its memory from what the graph holds.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work(generator)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, stream=stream):
            work(generator)

    return graph.replay, peak_memory(capture)


def peak_memory(work: Callable[[], object]) -> float:
    """Return what some work takes on the GPU at its peak beyond what is held before it, MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _figures(
    work: Work, run: Callable[[], object], rate: float, bandwidth: float
) -> dict[str, float]:
    sizes, seconds = work.sizes, median_seconds(run, _REPEATS)
    passes = sizes.update_passes if isinstance(work, SamplerUpdate) else sizes.gradients
    widths = [sizes.latent_dim, *sizes.hidden, work.case.x.shape[1]]
    moved = sizes.weights + sizes.rows * (2 * sum(widths) - widths[0] - widths[-1])
    return {
        "milliseconds": 1e3 * seconds,
        "microseconds_a_gradient_of_all_rows": 1e6 * seconds / sizes.gradients,
        "share_of_product_rate": 4 * passes * sizes.rows * sizes.weights / seconds / rate,
        "share_of_bandwidth": 2 * 4 * passes * moved / seconds / bandwidth,
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
    """Return the largest error of U against float64 over all rows, nats.

    The last layer's weights are spread, so that logits have about the standard deviation of a
    trained decoder's, 4: with 0.02, as they start, the rounding of products hardly shows in U.
    """
    case = Posterior(sizes, device)
    output = case.decoder.output
    output.weight.mul_(_LOGITS_STD / (case.decoder(case.z) - output.bias).std())
    single = case.model.energy(case.x)(case.z)
    double = case.model.double().energy(case.x.double())(case.z.double())
    return float((single - double).abs().max())
