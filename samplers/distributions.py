"""Any distribution of ``torch.distributions`` as an energy, constrained ones too."""

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, Transform, VonMises, biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    ExpTransform,
    IndependentTransform,
    identity_transform,
)


class DistributionEnergy:
    r"""A distribution as an energy on all of R^D.

    .. math:: U(y) = -\log p(T(y)) - \log \left| \det \tfrac{∂T}{∂y} \right|

    where T = ``biject_to(support)`` maps R^D onto the support: the identity for a multivariate
    normal, exp for a gamma distribution. Sample y, and turn the draws into x by :meth:`constrain`.

    Arguments:
        distribution: Of vectors, without a batch shape:
            ``Independent(Gamma(a, b), 1)`` for parameters (D,). A copy of it is kept that does
            not validate: a trajectory that has diverged is rejected and counted, not an error.
            Where T is more than exp, it is computed in float64: of numbers near the upper end of
            an interval float32 has too few.

    Raises:
        ValueError: It is a batch of distributions, or one of single numbers or matrices, discrete,
            periodic, a mixture whose components have other supports than one another, or one whose
            density torch cannot evaluate.

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
        if len(distribution.event_shape) > 1:
            raise ValueError(
                f"{type(distribution).__name__} is a distribution of matrices, which chains of "
                "vectors cannot draw: write the energy of their free numbers as a function"
            )
        if distribution.batch_shape or len(distribution.event_shape) != 1:
            raise ValueError(
                "the distribution must be one of vectors, with batch shape () and event shape "
                f"(D,), got {tuple(distribution.batch_shape)} and "
                f"{tuple(distribution.event_shape)}: wrap it in torch.distributions.Independent"
            )
        if any(isinstance(part, VonMises) for part in _parts(distribution)):
            raise ValueError(
                "a von Mises distribution is periodic: chains would leave the circle. Sample a "
                "point of the plane instead, of which it is the angle"
            )
        support = _support(distribution)
        try:
            self.transform = biject_to(support)
        except NotImplementedError as error:
            raise ValueError(
                f"{type(distribution).__name__} has the support {distribution.support}, which is "
                "no image of a vector space: gradients need one"
            ) from error
        distribution = _without_validation(distribution)
        self.precise = not _keeps_digits(self.transform)
        if self.precise:
            distribution = _in_double(distribution)
            self.transform = biject_to(_in_double(support))
        self.distribution = distribution
        self.dim: int = self.transform.inverse_shape(distribution.event_shape)[0]
        try:
            self(torch.zeros(1, self.dim, device=_device(distribution)))
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"the density of this {type(distribution).__name__} cannot be evaluated: "
                f"{str(error) or 'a transform inside has no inverse'}"
            ) from error

    def __call__(self, position: Tensor) -> Tensor:
        """Return U at unconstrained positions y (B, D), in nats, (B,).

        Raises:
            ValueError: D is not :attr:`dim`.
        """
        if position.shape[-1] != self.dim:
            raise ValueError(
                f"this distribution has {self.dim} unconstrained coordinates, the chains have "
                f"{position.shape[-1]}: start at torch.zeros(chains, energy.dim)"
            )
        y = position.double() if self.precise else position
        x = self.transform(y)
        value = -self.distribution.log_prob(x) - self.transform.log_abs_det_jacobian(y, x)
        return value.to(position.dtype)

    def constrain(self, position: Tensor) -> Tensor:
        """Return x = T(y), (…, D), for unconstrained draws y, float64 where that is needed."""
        return self.transform(position.double() if self.precise else position)


def _support(distribution: Distribution) -> Any:
    """Return where the density is; that of a mixture is its components'."""
    if isinstance(distribution, MixtureSameFamily):
        return _of_each(distribution.component_distribution.support)  # type: ignore[arg-type]
    return distribution.support


def _of_each(support: Constraint) -> Constraint:
    """Return the support that all components have, from one with bounds of each, (K, …)."""
    common = copy(support)
    for name, bound in list(vars(support).items()):
        if isinstance(bound, Constraint):
            setattr(common, name, _of_each(bound))
        elif isinstance(bound, Tensor) and bound.dim() > 0:
            if (bound != bound[:1]).any():
                raise ValueError(
                    "the components of the mixture have other supports than one another: no one "
                    "transform maps onto them all"
                )
            setattr(common, name, bound[0])
    return common


def _parts(distribution: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and those that it is made of."""
    yield distribution
    for part in vars(distribution).values():
        if isinstance(part, Distribution):
            yield from _parts(part)


def _device(distribution: Distribution) -> torch.device:
    """Return where the parameters are."""
    for part in _parts(distribution):
        for value in vars(part).values():
            if isinstance(value, Tensor):
                return value.device
    return torch.device("cpu")


def _keeps_digits(transform: Transform) -> bool:
    """Say whether a transform is as precise everywhere: the identity or exp."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform == identity_transform or isinstance(transform, ExpTransform)


def _in_double(part: Any) -> Any:
    """Return a copy of a distribution, transform or constraint whose numbers are float64."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, list | tuple):
        return type(part)(_in_double(each) for each in part)
    if not isinstance(part, Distribution | Transform | Constraint):
        return part
    copied = copy(part)
    for name, value in list(vars(part).items()):
        copied.__dict__[name] = _in_double(value)
    return copied


def _without_validation(distribution: Distribution) -> Distribution:
    copied = copy(distribution)
    copied._validate_args = False
    for name, part in list(vars(copied).items()):
        if isinstance(part, Distribution):
            setattr(copied, name, _without_validation(part))
    return copied
