"""The options of the comparison."""

from dataclasses import dataclass, field
from typing import Literal

from samplers import TrainingSettings

TargetName = Literal[
    "icg",
    "scg",
    "scg_notebook",
    "mog",
    "mog_unequal",
    "rough_well",
    "rough_well_release",
    "funnel",
    "banana",
]
PAPER = ("icg", "scg", "mog", "rough_well")
"""The targets of the paper's table."""

PAPERS_TRAINING = TrainingSettings(
    5000,
    200,
    "reciprocal",
    rewhiten=False,
    curvature_length=0.0,
    learning_rate=1e-3,
    final_learning_rate=0.82,
)

_FEWEST_STEPS = 132
"""So that the shortest of the tuning runs has four draws."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """The learned sampler.

    Args:
        num_leapfrogs: Leapfrogs of a proposal.
        step_size: Step size at the start.
        hidden: Units in each hidden layer of its networks.
        head_scale: Factor on the initial weights of the networks' last layers.
        initial_scale: Chains start from a normal distribution of this standard deviation.
    """

    num_leapfrogs: int = 10
    step_size: float = 0.1
    hidden: int = 10
    head_scale: float = 0.001
    initial_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class WhitenedOptions(SamplerOptions):
    """The learned sampler in whitened coordinates."""

    num_leapfrogs: int = 1
    step_size: float = 1.0
    hidden: int = 20


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is compared on which target.

    Args:
        target: The target; all for each of the paper's table in turn.
        seed: Seed of all randomness.
        sampler: The learned sampler.
        training: How it is trained.
        whitened: Another learned sampler, in the coordinates that a warm-up of HMC has whitened;
            none if null.
        temperatures: Of parallel tempering; none leaves it out.
        num_chains: Chains of the comparison, from exact draws.
        num_steps: Steps of each chain.
        compile: Compile long trainings, and each sampler before its chains are timed; searches of
            settings, warm-ups and parallel tempering run as they are.
        output: Run folder, with a folder in it for each target where there are several;
            runs/targets/TARGET-NNN if null.
        resume: Run folder to go on with.
        quiet: Show no progress bars.
    """

    target: TargetName | Literal["all"] = "scg"
    seed: int = 0
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    training: TrainingSettings = PAPERS_TRAINING
    whitened: WhitenedOptions | None = None
    temperatures: list[float] = field(default_factory=list)
    num_chains: int = 200
    num_steps: int = 2000
    compile: bool = True
    output: str | None = None
    resume: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A number is out of range.
        """
        if self.num_steps < _FEWEST_STEPS:
            raise ValueError(f"num_steps must be at least {_FEWEST_STEPS}, got {self.num_steps}")
        if self.num_chains < 2:
            raise ValueError(f"num_chains must be at least 2, got {self.num_chains}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
