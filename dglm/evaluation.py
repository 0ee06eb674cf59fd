"""What ``Trainer.test`` does with a deep latent Gaussian model: estimate its log-likelihood."""

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from dglm.ais import AISResult, AISSettings, estimate_log_likelihood, gather
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import FittedStart, Start
from samplers import mixed_seed


def _no_progress(gradients: int) -> None:
    """Show nothing; a function of the module, so that what holds it can be pickled."""


class LikelihoodEvaluation(LightningModule):
    """A module with a generative model and an encoder, tested by annealed importance sampling."""

    model: GenerativeModel
    encoder: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.ais = AISSettings()
        """How :meth:`test_step` estimates; set it before ``trainer.test``."""
        self.test_results: dict[int, AISResult] = {}
        """Estimates of this process, by batch; a caller may fill in those of an earlier run."""
        self.test_progress: Callable[[int], None] = _no_progress

    def ais_start(self, settings: AISSettings) -> Start:
        """Return where annealed importance sampling with these settings starts."""
        starts: dict[str, Start] = {
            "prior": "prior",
            "encoder": self.encoder,
            "fitted": FittedStart(self.encoder),
        }
        return starts[settings.start]

    @full_precision()
    def test_step(self, x: Tensor, batch_index: int) -> None:
        """Estimate the log-likelihood of a batch by annealed importance sampling.

        As ``ais`` says; batches that ``test_results`` holds already are not estimated again.
        """
        if batch_index in self.test_results:
            return
        options = asdict(self.ais)
        options["start"] = self.ais_start(self.ais)
        options["seed"] = mixed_seed(self.ais.seed, batch_index, self.global_rank)
        # torch.autograd.grad, the faster way to the forces, needs tensors made outside of the
        # inference mode that Trainer.test is in.
        with torch.inference_mode(False), torch.no_grad():
            self.test_results[batch_index] = estimate_log_likelihood(
                self.model, x.clone(), **options, progress=self.test_progress
            )

    def on_test_epoch_end(self) -> None:
        """Put the estimates of all batches and processes together and log their mean."""
        self.test_result = gather([self.test_results[index] for index in sorted(self.test_results)])
        self.test_results = {}  # the next test may be of other images
        log_likelihood = self.test_result.log_likelihood
        self.log("test/log_likelihood", log_likelihood.mean(), rank_zero_only=True)
        count = len(log_likelihood)
        error = log_likelihood.std() / count**0.5 if count > 1 else math.nan
        self.log("test/standard_error", error, rank_zero_only=True)
