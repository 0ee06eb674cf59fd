"""Many chains for each of many images, in pieces that fit in memory."""

import torch
from torch import Tensor

from dglm.model import GenerativeModel

_MEMORY_BUDGET = 2**30


def chunks_for_memory(
    model: GenerativeModel, images: Tensor, num_chains: int
) -> list[tuple[int, Tensor]]:
    """Return (first image, images repeated for their chains) in pieces of about a gibibyte.

    One image at least: its chains stay together.

    The pieces depend on the sizes alone, not on the machine, so that results do not either.
    """
    images_each = max(1, _MEMORY_BUDGET // (num_chains * _bytes_per_chain(model, images[:2])))
    return [
        (first, images[first : first + images_each].repeat_interleave(num_chains, dim=0))
        for first in range(0, len(images), images_each)
    ]


def _bytes_per_chain(model: GenerativeModel, images: Tensor) -> int:
    """Return roughly what one more chain takes: twice what autograd saves for one more row."""
    saved = []
    for rows in (1, 2):
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            x = torch.zeros(rows, images.shape[1], dtype=images.dtype, device=images.device)
            z = x.new_zeros(rows, model.latent_dim).requires_grad_()
            model.negative_log_likelihood(x)(z)
        saved.append(total)
    image = images.shape[1] * images.element_size()
    return 2 * (saved[1] - saved[0] + image)
