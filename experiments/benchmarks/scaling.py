"""How the time of a sampler update grows with each of its sizes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.benchmarks.cases import DEFAULT_TRAINING, SamplerUpdate, Sizes
from experiments.benchmarks.timing import median_seconds

_FIELDS = {
    "chains": "rows",
    "MH steps": "mh_steps",
    "leapfrogs": "leapfrogs",
    "latent dimensions": "latent_dim",
}


def scaling(
    base: Sizes = DEFAULT_TRAINING,
    factors: Sequence[int] = (1, 2, 4),
    compile: bool = True,
    repeats: int = 7,
) -> dict[str, Any]:
    """Time updates with one of their sizes multiplied by each of the factors."""
    rows = []
    for name, field in _FIELDS.items():
        first = 0.0
        for factor in factors:
            sizes = replace(base, **{field: factor * getattr(base, field)})
            seconds = median_seconds(SamplerUpdate(sizes, compile), repeats)
            first = first or seconds
            rows.append(
                {
                    "growing": name,
                    "size": getattr(sizes, field),
                    "size_ratio": factor / factors[0],
                    "time_ratio": seconds / first,
                    "seconds": seconds,
                    "microseconds_a_gradient": 1e6 * seconds / (sizes.gradients * sizes.rows),
                }
            )
    return {
        "title": f"L2HMC-DGLM sampler update {base.mh_steps} × {base.leapfrogs}, {base}",
        "rows": rows,
        "note": f"ratios to the first size of each; medians of {repeats}",
    }
