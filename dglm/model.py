"""The generative model p(x, z) = p(z) p(x|z)."""

import torch
from torch import Tensor, nn

from dglm.energy import NegativeLogLikelihood, PosteriorEnergy
from dglm.gaussian import gaussian_log_prob
from dglm.likelihoods import Bernoulli, Likelihood
from dglm.networks import Selected

_OTHER_IN_TRAINING = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU


class GenerativeModel(nn.Module):
    r"""A deep latent Gaussian model.

    .. math:: z \sim N(0, I), \quad x \sim p(x | f(z))

    Arguments:
        decoder: f, any module from z (B, latent_dim) to logits or means (B, N).
        latent_dim: Length of z.
        likelihood: What the decoder's output means; Bernoulli logits by default.

    Raises:
        ValueError: ``latent_dim`` is below 1.

    References:
        Auto-encoding variational Bayes (Kingma and Welling, 2014).
        Stochastic backpropagation and approximate inference in deep generative models (Rezende,
        Mohamed and Wierstra, 2014).

    Example:
        >>> import torch
        >>> from dglm import GenerativeModel
        >>> model = GenerativeModel(torch.nn.Linear(2, 6), latent_dim=2)
        >>> x, z = model.sample(3)
        >>> model.log_joint(x, z).shape
        torch.Size([3])
    """

    def __init__(
        self, decoder: nn.Module, latent_dim: int, likelihood: Likelihood | None = None
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = Bernoulli() if likelihood is None else likelihood

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), (B,) nats."""
        return gaussian_log_prob(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x|z), (B,) nats."""
        return self.likelihood.log_prob(self.decoder(z), x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z), (B,) nats, for observations (B, N) and latent variables (B, D)."""
        return self.log_likelihood(x, z) + self.log_prior(z)

    def energy(self, x: Tensor) -> PosteriorEnergy:
        """Return U(z) = -log p(x, z) for observations (B, N), with the decoder frozen.

        No gradient reaches the decoder's parameters through it; it sees their present values.
        """
        return PosteriorEnergy(self.negative_log_likelihood(x))

    def negative_log_likelihood(self, x: Tensor) -> NegativeLogLikelihood:
        """Return z ↦ -log p(x|z) for observations (B, N), with the decoder frozen."""
        return NegativeLogLikelihood(self.decoder, self.likelihood, x)

    def marginal(self, given: Tensor) -> "GenerativeModel":
        r"""Return the model of some of the observations alone.

        .. math:: p(z) \prod_{i \text{ given}} p(x_i|z)

        Observations are independent given z, so that leaving the others out integrates them out.
        The decoder is shared.

        Arguments:
            given: True where an observation is kept, boolean, (N,).

        Raises:
            ValueError: The mask has the wrong type or shape, or keeps nothing.
        """
        width = self.check_decoder()
        if given.dtype != torch.bool or given.shape != (width,):
            raise ValueError(
                f"the mask of given observations must be boolean, ({width},), "
                f"got {given.dtype}, {tuple(given.shape)}"
            )
        if not given.any():
            raise ValueError("no observation is given: what is left is the prior")
        device = next(self.decoder.parameters(), given).device
        decoder = Selected(self.decoder, given.to(device))
        return GenerativeModel(decoder, self.latent_dim, self.likelihood)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n observations and their latent variables, (n, N) and (n, latent_dim)."""
        parameter = next(self.decoder.parameters(), torch.empty(0))
        z = torch.randn(
            n,
            self.latent_dim,
            generator=generator,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        return self.likelihood.sample(self.decoder(z), generator), z

    @torch.no_grad()
    def check_decoder(self) -> int:
        """Return N, the length of an observation.

        Raises:
            ValueError: The decoder's output is not flat, (B, N), or not a function of z alone.
        """
        check_evaluation_mode("decoder", self.decoder)
        parameter = next(self.decoder.parameters(), torch.empty(0))
        shape = self.decoder(parameter.new_zeros(1, self.latent_dim)).shape
        if len(shape) != 2:
            raise ValueError(
                f"the decoder must return flat (B, N), but it returns {tuple(shape)} for B = 1"
                "; put torch.nn.Flatten() behind it"
            )
        return shape[1]

    def check_observations(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a batch (B, N) that this model can have produced."""
        width = self.check_decoder()
        if x.dim() != 2 or x.shape[1] != width:
            flat = "; flatten them with x.flatten(1)" if x.shape[1:].numel() == width else ""
            raise ValueError(
                f"this model's observations are flat, (B, {width}), got {tuple(x.shape)}{flat}"
            )
        if len(x) == 0:
            raise ValueError("there are no observations: the batch is empty")
        self.likelihood.check(x)
        parameter = next(self.decoder.parameters(), torch.empty(0))
        if (x.dtype, x.device) != (parameter.dtype, parameter.device):
            raise ValueError(
                f"this model's observations are {parameter.dtype} on {parameter.device}, got "
                f"{x.dtype} on {x.device}: pass x.to('{parameter.device}', {parameter.dtype})"
            )


def check_evaluation_mode(name: str, network: nn.Module) -> None:
    """Refuse a network that does not treat the rows of a batch alike and apart.

    Raises:
        ValueError: A layer of dropout or batch normalization is in training mode, or normalizes
            by the batch in evaluation mode too.
    """
    for layer in network.modules():
        if not isinstance(layer, _OTHER_IN_TRAINING):
            continue
        if layer.training:
            raise ValueError(
                f"the {name}'s {type(layer).__name__} is in training mode, where its output "
                f"is not a function of its input alone; call {name}.eval()"
            )
        if getattr(layer, "running_mean", layer) is None:
            raise ValueError(
                f"the {name}'s {type(layer).__name__} normalizes by the batch at hand, so that its "
                "output is not a function of its input alone; build it with track_running_stats"
            )
