"""Coordinates for each observation, learned, in which a kernel finds posteriors alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm.gaussian import DenseGaussian
from dglm.networks import InferenceNetwork
from samplers import Energy, Info, Kernel, State
from samplers.kernel import Context, Endpoint, PhasePoint
from samplers.objective import squared_differences
from samplers.preconditioned import Transformed, Whitened

_LEAST = 1e-3
_LEAST_ACCEPTANCE = 1e-4
_REJECTIONS = 5.0
"""Nats of :func:`sibling_loss` for each nat of log A."""


class GaussianNetwork(InferenceNetwork):
    r"""A softplus network from observations to Gaussians with dense covariances.

    .. math:: x \mapsto N(δ(x), F(x) F(x)^\top), \quad F_{ii}(x) = e^{a_i(x)}

    The last layer begins near zero, and so the Gaussian at N(0, I). One hidden layer comes nearer
    to the covariances of posteriors than two, in as many updates.

    Arguments and errors are those of :class:`dglm.Encoder`.

    Shapes: x (B, observation_dim) to δ (B, latent_dim) and F (B, latent_dim, latent_dim).
    """

    below: Tensor

    def __init__(
        self, observation_dim: int, latent_dim: int, hidden: Sequence[int] = (200,)
    ) -> None:
        super().__init__(observation_dim, latent_dim, hidden)
        below = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.output = nn.Linear(hidden[-1], 2 * latent_dim + below.shape[1])
        with torch.no_grad():
            self.output.weight.mul_(0.01)
            self.output.bias.zero_()
        self.register_buffer("below", below, persistent=False)

    def forward(self, x: Tensor) -> DenseGaussian:
        """Return the Gaussian of each observation."""
        sizes = self.latent_dim, self.latent_dim, self.below.shape[1]
        mean, log_diagonal, lower = self.output(self.trunk(x)).split(sizes, dim=1)
        factor = torch.diag_embed(log_diagonal.exp())
        factor[:, self.below[0], self.below[1]] = lower
        return DenseGaussian(mean, factor)


class Coordinates(NamedTuple):
    """The context of an :class:`AmortizedPreconditioned` kernel."""

    gaussian: DenseGaussian
    """N(μ(x), L(x) L(x)ᵀ), one for each observation."""
    inside: Context
    """The context of the kernel inside."""


class AmortizedPreconditioned(Transformed):
    r"""Any kernel, run in coordinates of each observation's own, w = L(x)⁻¹(z - μ(x)).

    .. math:: L(x) = \operatorname{diag}(s(x)) \, F(x), \quad μ(x) = m(x) + L(x) \, δ(x)

    with the mean m and the standard deviations s of q(z|x), which follow a moving decoder most
    closely, and δ and F of a network of their own. Where N(μ, L Lᵀ) is like p(z|x), all posteriors
    are like N(0, I) in w: one step size suits all images, and few leapfrogs make an independent
    draw. The coordinates are constant in z, so that a step leaves p(z|x) invariant whatever they
    are.

    Arguments:
        kernel: What moves in w: HMC, or L2HMC with the embedding of its observations.
        network: From observations (B, N) to a :class:`dglm.gaussian.DenseGaussian`, δ and F; no
            gradient reaches it through a step.
        encoder: From observations to m and log s of q(z|x); no gradient reaches it from here. A
            :class:`dglm.DGLM` puts its own in this place.

    Shapes: as a module, x (B, N) to μ (B, latent_dim) and L (B, latent_dim, latent_dim).

    References:
        :class:`samplers.Preconditioned`, whose coordinates are the same for all chains.
    """

    def __init__(self, kernel: Kernel, network: nn.Module, encoder: nn.Module) -> None:
        super().__init__(kernel)
        self.network = network
        self.encoder = encoder

    def forward(self, observations: Tensor) -> DenseGaussian:
        """Return N(μ(x), L(x) L(x)ᵀ) of each observation."""
        shift, factor = self.network(observations)
        with torch.no_grad():
            mean, log_std = (part.to(shift) for part in self.encoder(observations))
        factor = log_std.exp()[:, :, None] * factor
        return DenseGaussian(DenseGaussian(mean, factor.detach()).colour(shift), factor)

    def embed(self, observations: Tensor) -> Coordinates:
        """Return the coordinates of observations (B, N), and the context of the kernel inside."""
        return Coordinates(self(observations), self.kernel.embed(observations))

    def coordinates(self, energy: Energy, context: Context = None) -> Whitened:
        """Return the energy as a function of w.

        Raises:
            ValueError: There is no context.
        """
        if context is None:
            raise ValueError("coordinates are those of observations: pass context=kernel.embed(x)")
        return Whitened(energy, DenseGaussian(*(part.detach() for part in context.gaussian)))

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Follow the kernel's trajectory in w."""
        inside = self.coordinates(energy, context)
        return inside.integrate(self.kernel, start, context.inside)


def score_loss(gaussian: DenseGaussian, state: State) -> Tensor:
    r"""Return the loss that makes posteriors standard normal in the coordinates of a Gaussian.

    .. math:: \tfrac{D}{2} \log\bigl(1 + r / D\bigr), \quad
        r = |L^{-1} (z - μ) - L^\top ∂U(z)|^2

    In w = L⁻¹(z - μ) the scores of N(0, I) and of p(z|x) are -w and -Lᵀ∂U(z); the mean of r over
    p(z|x) is their Fisher divergence. For a Gaussian posterior it is 0 at every z: draws of a chain
    that is still as narrow as q teach the posterior's own width, where their likelihood would
    teach theirs. The logarithm bounds what a single draw far out can do. The gradient is the
    chain's and costs nothing.

    Arguments:
        gaussian: μ and L, one for each row.
        state: Where the chains are, (B, D); no gradient reaches it.

    Returns:
        The loss of each chain, (B,).

    References:
        Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence (Seyboldt, Carlson
        and Carpenter, 2026), without the logarithm.
    """
    z, gradient = state.position.detach(), state.gradient.detach()
    dim = z.shape[1]
    difference = (gaussian.whiten(z) - gaussian.pull(gradient)).square().sum(dim=-1)
    return 0.5 * dim * torch.log1p(difference / dim)


def sibling_loss(gaussian: DenseGaussian, start: Tensor, info: Info) -> Tensor:
    r"""Return the loss that asks two steps from one state to end far apart, and to be accepted.

    .. math:: -\tfrac{1}{2} \sum_{f ∈ \{w, w^2\}} \log \min(S_f, J_f) - 5 \, E[\log A]

    with S and J as in :func:`samplers.objective.siblings`, but of all coordinates together and
    over the variances 1 of w and 2 of w², those of the posterior in good coordinates. Both are 1
    where draws are independent; a leap to the mirror image, which jumps alone would reward, has
    S = 0. Of 20 rejections in 100 S loses 4, but a short chain that stays at q is far from the
    posterior: hence the last term, which leaves about five.

    Arguments:
        gaussian: Whose coordinates w are, of all 2n rows; no gradient reaches it.
        start: Where the steps begin, the same n points twice, (2n, D).
        info: Of the steps.

    Returns:
        The loss, 0-d.
    """
    fixed = DenseGaussian(*(part.detach() for part in gaussian))
    w, proposal = fixed.whiten(start.detach()), fixed.whiten(info.proposal)
    acceptance = info.acceptance[:, None]
    loss = -_REJECTIONS * torch.log(acceptance + _LEAST_ACCEPTANCE).mean()
    for power, variance in ((1, 1.0), (2, 2.0)):
        begin, _ = w.pow(power).chunk(2)
        first, second = proposal.pow(power).chunk(2)
        apart, *moved = squared_differences((begin, first, second), *acceptance.chunk(2))
        s, j = (
            apart.mean() / (2 * variance),
            (acceptance * torch.cat(moved)).mean() / (2 * variance),
        )
        loss = loss - 0.5 * torch.log(torch.minimum(s, j) + _LEAST)
    return loss


def without_coordinates(kernel: Kernel) -> Kernel:
    """Return the kernel inside learned coordinates, or the kernel itself where it has none."""
    return kernel.kernel if isinstance(kernel, AmortizedPreconditioned) else kernel
