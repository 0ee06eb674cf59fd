import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dglm import DGLM


@pytest.mark.parametrize("kind", ["vae", "hmc", "l2hmc"])
def test_a_model_can_be_pickled(build_dglm: Callable[..., DGLM], images: Tensor, kind: str) -> None:
    module = build_dglm(kind)
    again = pickle.loads(pickle.dumps(module))
    samples = [each.posterior_samples(images, 0, torch.Generator()) for each in (module, again)]
    assert torch.equal(*samples)
