"""Any distribution of ``torch.distributions`` as an energy, constrained ones too."""

from copy import copy
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, biject_to


class DistributionEnergy:
    r"""A distribution as an energy on all of R^D.

    .. math:: U(y) = -\log p(T(y)) - \log \left| \det \tfrac{∂T}{∂y} \right|

    where T = ``biject_to(support)`` maps R^D onto the support: the identity for a multivariate
    normal, exp for a gamma distribution. Sample y, and turn the draws into x by :meth:`constrain`.

    Arguments:
        distribution: Of vectors, without a batch shape:
            ``Independent(Gamma(a, b), 1)`` for parameters (D,). A copy of it is kept that does
            not validate: a trajectory that has diverged is rejected and counted, not an error.

    Raises:
        ValueError: It is a batch of distributions, or one of single numbers, or a discrete one.

    Example:
        >>> import torch
        >>> from torch.distributions import Gamma, Independent
        >>> from samplers import HMC, DistributionEnergy, sample
        >>> gamma = Independent(Gamma(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 1.0])), 1)
        >>> energy = DistributionEnergy(gamma)
        >>> chains = sample(HMC(5, 0.3), energy, torch.zeros(100, energy.dim), num_draws=20)
        >>> bool((energy.constrain(chains.draws) > 0).all())
        True
    """

    def __init__(self, distribution: Distribution) -> None:
        if distribution.batch_shape or len(distribution.event_shape) != 1:
            raise ValueError(
                "the distribution must be one of vectors, with batch shape () and event shape "
                f"(D,), got {tuple(distribution.batch_shape)} and "
                f"{tuple(distribution.event_shape)}: wrap it in torch.distributions.Independent"
            )
        self.distribution = _without_validation(distribution)
        try:
            self.transform = biject_to(_support(distribution))
        except NotImplementedError as error:
            raise ValueError(
                f"{type(distribution).__name__} has the support {distribution.support}, which is "
                "no image of a vector space: gradients need one"
            ) from error
        self.dim: int = self.transform.inverse_shape(distribution.event_shape)[0]

    def __call__(self, position: Tensor) -> Tensor:
        """Return U at unconstrained positions y (B, D), in nats, (B,)."""
        x = self.transform(position)
        return -self.distribution.log_prob(x) - self.transform.log_abs_det_jacobian(position, x)

    def constrain(self, position: Tensor) -> Tensor:
        """Return x = T(y), (…, D), for unconstrained draws y."""
        return self.transform(position)


def _support(distribution: Distribution) -> Any:
    """Return where the density is; that of a mixture is its components'."""
    if isinstance(distribution, MixtureSameFamily):
        return distribution.component_distribution.support
    return distribution.support


def _without_validation(distribution: Distribution) -> Distribution:
    copied = copy(distribution)
    copied._validate_args = False
    for name, part in list(vars(copied).items()):
        if isinstance(part, Distribution):
            setattr(copied, name, _without_validation(part))
    return copied
