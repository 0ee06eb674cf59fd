"""Training of deep latent Gaussian models: VAE, HMC-DGLM and L2HMC-DGLM."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dglm.ais import AISResult, AISSettings, gather, quiet_estimate, warn_of
from dglm.annealing import check_counts
from dglm.callbacks import Safeguard
from dglm.chain import TRAINED_EVERY, TRAINED_SHARE, Chain, run_chain
from dglm.checks import (
    Parts,
    check_kept_fingerprint,
    check_sizes,
    check_trainer,
    checked_descriptions,
    evaluation_mode,
    kept_fingerprint,
    present_descriptions,
    warn_of_compiled_steps,
)
from dglm.coordinates import AmortizedPreconditioned, without_coordinates
from dglm.gaussian import DiagonalGaussian
from dglm.importance import mean_and_error
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import StartName, named_start
from samplers import Kernel, seeded_generator
from samplers.adaptation import track_acceptance
from samplers.io import Description, build
from samplers.random import mixed_seed

SAMPLER_GRADIENT_NORM = 5.0
"""Bound on the norm of the sampler's gradient, the paper's."""
ACCEPTANCE = 0.95
"""That HMC's step size follows: 0.65, best in long chains, leaves short ones far from p(z|x)."""
_LONGEST_TRAJECTORY = 0.6 * math.pi
"""ε M of HMC in coordinates."""
_LAST = 0.03
"""What is left of the learning rate in the end."""
_WARM_UP = 100
"""Updates in which it rises: Adam's first steps all have its full length, and a network of
coordinates that they carry too far has all chains diverge."""
_LOOK_EVERY = 10
_SETTINGS = ("num_mh_steps", "learning_rate", "seed", "jump_scale", "decay_share")


class DGLM(LightningModule):
    r"""A deep latent Gaussian model, trained with posterior samples of a Markov chain.

    One training step on a minibatch x, for J = ``num_mh_steps``:

    1. z₀ ~ q(z|x); the encoder ascends E log p(x, z₀) + H[q], the decoder held fixed.
    2. From z₀ (no gradient), J steps of the kernel; the sampler descends Σ_j ℓ_λ(δ_j A_j), with
       jumps δ measured in the standard deviations of q, through ∂U to second order.
    3. The decoder ascends log p(x, z_J) (no gradient to z_J).
    4. Coordinates of each image's own (:class:`dglm.AmortizedPreconditioned`), in units of q,
       descend their score loss at z_J, and the sampler in them, in place of ℓ, the sibling loss.

    ``kernel=None`` is the VAE, where encoder and decoder ascend the evidence lower bound together;
    ``HMC`` is HMC-DGLM, its step size following an acceptance of 0.95; ``L2HMC`` is L2HMC-DGLM.

    Arguments:
        model: p(x, z).
        encoder: Any module from x (B, N) to the mean and log standard deviation of q(z|x), each
            (B, latent_dim).
        kernel: What refines the draws of q.
        num_mh_steps: J, Metropolis-Hastings steps from q to the draw that trains the decoder.
        learning_rate: Adam's, for all parts; it rises to that over the first 100 updates.
        seed: All randomness of training is a function of (seed, global step, rank).
        jump_scale: λ, the jump that counts as good, in standard deviations of q; the paper's is 1.
        decay_share: Share of the training, its last part, in which the learning rate falls
            geometrically to 3 %, so that the sampler can follow the decoder. Of a training that
            is resumed with another length, that length counts.

    Raises:
        ValueError: ``num_mh_steps`` is below 1, ``jump_scale`` not positive, ``decay_share``
            outside of [0, 1], a decay asked for in a training without end, or a ``jump_scale`` for
            a kernel in coordinates; or a checkpoint would rebuild a part as another function.
        TypeError: A module cannot be described in a checkpoint (see samplers.io).

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Algorithm 2.
        Learning deep latent Gaussian models with Markov chain Monte Carlo (Hoffman, 2017).
    """

    model: GenerativeModel
    encoder: nn.Module
    kernel: Kernel | None

    def __init__(
        self,
        model: GenerativeModel | Description,
        encoder: nn.Module | Description,
        kernel: Kernel | Description | None = None,
        num_mh_steps: int = 5,
        learning_rate: float = 1e-3,
        seed: int = 0,
        jump_scale: float = 1.0,
        decay_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(num_mh_steps=num_mh_steps)
        if not jump_scale > 0:
            raise ValueError(f"jump_scale must be positive, got {jump_scale}")
        if not 0 <= decay_share <= 1:
            raise ValueError(f"decay_share must lie between 0 and 1, got {decay_share}")
        self.model = build(model)  # type: ignore[assignment]
        self.encoder = build(encoder)
        self.kernel = None if kernel is None else build(kernel)  # type: ignore[assignment]
        if isinstance(self.kernel, AmortizedPreconditioned):
            self.kernel.encoder = self.encoder  # a checkpoint describes it twice
            if jump_scale != 1:
                raise ValueError(
                    f"jump_scale {jump_scale} would be ignored: in coordinates of each image's own "
                    "a sampler has another loss; leave it out"
                )
        self.num_mh_steps = num_mh_steps
        self.learning_rate = learning_rate
        self.seed = seed
        self.jump_scale = jump_scale
        self.decay_share = decay_share
        self.safeguard = Safeguard()
        """Counts skipped updates and divergences."""
        self.ais = AISSettings()
        """How :meth:`test_step` estimates; set it before ``trainer.test``."""
        self.ais_start: StartName = "fitted"
        """Where that starts; what it names is the model's own."""
        self.test_results: dict[int, AISResult] = {}
        """Estimates of this process, by batch; a caller may fill in those of an earlier run."""
        self.test_progress: Callable[[int], None] = _no_progress
        self._observation_dim: int | None = None  # known once a Trainer has set this up
        modules = checked_descriptions(self.parts)
        self.save_hyperparameters(ignore=list(modules), logger=False)
        self.save_hyperparameters(modules, logger=False)

    @property
    def sampler(self) -> Kernel | None:
        """The kernel without its coordinates: what the sampler's loss trains."""
        return None if self.kernel is None else without_coordinates(self.kernel)

    @property
    def coordinate_network(self) -> nn.Module | None:
        """The network of the kernel's coordinates, in units of q, where it has one."""
        return self.kernel.network if isinstance(self.kernel, AmortizedPreconditioned) else None

    @property
    def gradients_per_update(self) -> float:
        """Gradients of U that one training step takes for each image, in the mean over a batch."""
        if self.kernel is None or self.sampler is None:
            return 0
        chain = self.num_mh_steps * self.kernel.num_leapfrogs + 1
        learned = self.coordinate_network is not None and any(
            True for _ in self.sampler.parameters()
        )
        trained = TRAINED_SHARE / TRAINED_EVERY if learned else 0
        return chain + 2 * trained * self.kernel.num_leapfrogs

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """Return q(z|x) for observations (B, N), in their precision."""
        mean, log_std = self.encoder(x)
        return DiagonalGaussian(mean.to(x.dtype), log_std.to(x.dtype))

    @torch.no_grad()
    def posterior_samples(
        self, x: Tensor, num_mh_steps: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Draw z for each observation: from q(z|x), then refined by the kernel, if there is one.

        Arguments:
            x: Observations, (B, N).
            num_mh_steps: Steps of the kernel, by default as many as in training; 0 for q alone.
            generator: Of the noise; without one, torch's global generator.

        Returns:
            Latent variables, (B, latent_dim).

        Raises:
            ValueError: ``num_mh_steps`` is negative, or the observations cannot be this model's.
        """
        if num_mh_steps is not None and num_mh_steps < 0:
            raise ValueError(f"num_mh_steps must be 0 or more, got {num_mh_steps}")
        x = self.model.observations(x)
        q = self.posterior(x)
        z = q.sample(generator)
        if self.kernel is None or num_mh_steps == 0:
            return z
        return self.chain(x, q, z, generator, num_mh_steps).state.position

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, num_mh_steps: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the mean of p(x'|z) at a posterior sample z for each observation, (B, N).

        The arguments are those of :meth:`posterior_samples`.
        """
        z = self.posterior_samples(x, num_mh_steps, generator)
        return self.model.likelihood.mean(self.model.decoder(z))

    @full_precision()
    def chain(
        self,
        x: Tensor,
        q: DiagonalGaussian,
        start: Tensor,
        generator: Generator | None = None,
        num_mh_steps: int | None = None,
        train_sampler: bool = True,
    ) -> Chain:
        """Run the kernel as in training, by default as many steps (:func:`dglm.chain.run_chain`).

        Raises:
            ValueError: The model is a VAE.
        """
        if self.kernel is None:
            raise ValueError("a VAE has no kernel to run: build the DGLM with one")
        steps = self.num_mh_steps if num_mh_steps is None else num_mh_steps
        more = self.jump_scale, train_sampler
        return run_chain(self.model, self.kernel, x, q, start, steps, generator, *more)

    def setup(self, stage: str) -> None:
        """Refuse what would not train or not be exact, before anything is computed.

        Raises:
            ValueError: The precision is too low, all gradients are to be clipped, the decoder is no
                function of z, or encoder, decoder and kernel do not fit together.
        """
        check_trainer(self.trainer)
        check_sizes(self.parts)
        self._observation_dim = self._check_decoder()
        warn_of_compiled_steps(self)

    def _check_decoder(self) -> int:
        # Dropout and batch statistics do no harm to a VAE, which has no chain.
        with evaluation_mode(self.model.decoder if self.kernel is None else None):
            return self.model.check_decoder()

    @property
    def parts(self) -> Parts:
        """Model, encoder and kernel."""
        return self.model, self.encoder, self.kernel

    def _observations(self, batch: Any, batch_index: int) -> Tensor:
        """Return a loader's batch as the model takes it.

        Raises:
            ValueError: The model cannot have produced it. On a GPU, where looking at its numbers
                has the host wait, those of one batch in ten are looked at.
        """
        x = self.model.flat(batch, self._observation_dim or self._check_decoder())
        if x.device.type == "cpu" or batch_index % _LOOK_EVERY == 0:
            self.model.likelihood.check(x)
        return x.to(next(self.parameters()))

    @torch.compiler.disable
    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the sum of the losses; each reaches parameters that the others do not."""
        x = self._observations(batch, batch_index)
        accumulated = self.trainer.accumulate_grad_batches
        index = self.global_step * accumulated + batch_index % accumulated
        generator = self._generator("training", index)
        q = self.posterior(x)
        z = q.sample(generator)
        if self.kernel is None:
            elbo = self.model.log_joint(x, z) + q.entropy()
            self._log("train", log_elbo=elbo)
            return -elbo.mean()
        trained = self.coordinate_network is None or self._sampler_is_due
        chain = self.chain(x, q, z, generator, train_sampler=trained)
        elbo = q.entropy() + chain.log_joint_at_start(z)
        self.safeguard.note_divergence(chain.diverging)
        log_joint = self.model.log_joint(x, chain.state.position.detach())
        self._log("train", log_elbo=elbo, step_size=self.kernel.step_size, **chain.metrics)
        self._log("train", jump=chain.jump, **({"sampler_loss": chain.loss} if trained else {}))
        if self.coordinate_network is not None:
            self._log("train", coordinate_loss=chain.coordinate_loss)
        if not isinstance(self.kernel.log_step_size, nn.Parameter):
            acceptance = self.trainer.strategy.reduce(chain.acceptance.mean(), reduce_op="mean")
            track_acceptance(self.kernel, acceptance, ACCEPTANCE)
            if self.coordinate_network is not None:
                self._shorten_trajectories()
        return (chain.loss + chain.coordinate_loss - elbo - log_joint).mean()

    @property
    def _sampler_is_due(self) -> bool:
        """Whether a sampler in coordinates is trained: all batches of an update are alike."""
        return self.global_step % TRAINED_EVERY == TRAINED_EVERY - 1

    def _shorten_trajectories(self) -> None:
        """Keep ε M below 0.6 π, a little above a quarter of a period of coordinates of width 1.

        At π a trajectory is at the mirror image of its start: the acceptance is highest there, and
        z_J as far from the mean as q's draw was.
        """
        assert self.kernel is not None
        longest = math.log(_LONGEST_TRAJECTORY / self.kernel.num_leapfrogs)
        self.kernel.log_step_size.clamp_(max=longest)

    @torch.compiler.disable
    @full_precision()
    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Log the bound, and how far the kernel carries log p(x, z) from q's value."""
        x = self._observations(batch, batch_index)
        generator = self._generator("validation", batch_index)
        q = self.posterior(x)
        z = q.sample(generator)
        log_joint = self.model.log_joint(x, z)
        self._log("validation", log_elbo=log_joint + q.entropy(), log_joint_q=log_joint)
        if self.kernel is not None:
            self._log("validation", **self.chain(x, q, z, generator).metrics)

    @torch.compiler.disable
    def predict_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return a posterior sample for each observation, (B, latent_dim)."""
        return self.posterior_samples(batch, generator=self._generator("prediction", batch_index))

    @torch.compiler.disable
    @full_precision()
    def test_step(self, batch: Any, batch_index: int) -> None:
        """Estimate the log-likelihood of a batch by annealed importance sampling.

        As ``ais`` says; batches that ``test_results`` holds already are not estimated again.
        """
        if batch_index in self.test_results:
            return
        seed = mixed_seed(self.ais.seed, batch_index, self.global_rank)
        settings = replace(self.ais, seed=seed)
        # torch.autograd.grad, the faster way to the forces, needs tensors made outside of the
        # inference mode that Trainer.test is in.
        with torch.inference_mode(False), torch.no_grad():
            x = self._observations(batch, 0).clone()
            self.test_results[batch_index] = quiet_estimate(
                self.model,
                x,
                settings,
                named_start(self.ais_start, self),
                self.test_progress,
            )

    def on_test_epoch_end(self) -> None:
        """Put the estimates of all batches and processes together and log their mean."""
        self.test_result = gather([self.test_results[index] for index in sorted(self.test_results)])
        warn_of(self.test_result)
        self.test_results = {}  # the next test may be of other images
        mean, error = mean_and_error(self.test_result.log_likelihood)
        self.log("test/log_likelihood", mean, rank_zero_only=True)
        self.log("test/standard_error", error, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings and parts as they are now, and what the parts return for fixed inputs.

        Warns:
            UserWarning: A part has become what no checkpoint can rebuild.
        """
        kept = {name: getattr(self, name) for name in _SETTINGS}
        try:
            kept |= present_descriptions(self.parts, self.hparams)
        except (TypeError, ValueError) as error:
            warnings.warn(f"this checkpoint will not load: {error}", stacklevel=2)
        checkpoint["hyper_parameters"] = {**self.hparams, **kept}
        checkpoint["fingerprint"] = kept_fingerprint(self.parts, self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the weights, and look whether they still make the same functions.

        Raises:
            ValueError: They do not.
        """
        if self._trainer is None:  # which would have chosen the precision
            weights = checkpoint["state_dict"].values()
            self.to(next(each.dtype for each in weights if each.is_floating_point()))
        self.load_state_dict(checkpoint["state_dict"], strict=False)  # Lightning will be strict
        if "fingerprint" in checkpoint:
            check_kept_fingerprint(checkpoint["fingerprint"], self.parts, self.state_dict())

    def configure_callbacks(self) -> list[Callback]:
        """Have every Trainer skip what is not finite."""
        return [self.safeguard]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam, with a parameter group for each part of the model, and its rate's course."""
        parts = [self.encoder, self.model, self.sampler, self.coordinate_network]
        groups = [list(part.parameters()) for part in parts if part is not None]
        adam = torch.optim.Adam(
            [{"params": group} for group in groups if group], lr=self.learning_rate, fused=True
        )
        share = self.decay_share
        updates = self.trainer.estimated_stepping_batches if share else 0
        if share and not 0 < updates < math.inf:  # -1 of a stream of batches
            raise ValueError(
                "decay_share needs the training's length: set max_epochs or max_steps, or no decay"
            )

        def rate(done: int) -> float:
            decayed = max(0.0, (done / updates - 1 + share) / share) if share else 0.0
            return min(1.0, (done + 1) / _WARM_UP) * _LAST**decayed

        schedule = LambdaLR(adam, rate)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        """Clip the sampler's gradient, whose reciprocal loss has heavy tails; no other."""
        learned = [] if self.sampler is None else list(self.sampler.parameters())
        if learned:
            nn.utils.clip_grad_norm_(learned, SAMPLER_GRADIENT_NORM)

    def _generator(self, stream: str, index: int) -> Generator:
        return seeded_generator(self.device, self.seed, stream, index, self.global_rank)

    def _log(self, stage: str, **metrics: Tensor) -> None:
        """Log means over a batch: of training where something will read them.

        Lightning takes some milliseconds to note them, of which small updates would feel a tenth.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        written = every > 0 and (self.global_step + 1) % every == 0
        read = written or self._sampler_is_due or self.trainer.is_last_batch
        if stage == "train" and not read:
            return
        means = {f"{stage}/{name}": value.detach().mean() for name, value in metrics.items()}
        shown = f"{stage}/log_joint", f"{stage}/acceptance"
        for name, value in means.items():
            self.log(name, value, prog_bar=name in shown, sync_dist=stage != "train")


def _no_progress(gradients: int) -> None:
    """Show nothing; a function of the module, so that what holds it can be pickled."""
