"""Animate-2: the pass of a driving video through the transformer, before the steps of a clip.

Its transformer is that of image to video; what is new is the attention of `DrivenAttention`.

Source: Wan-Animate-2 (arXiv:2608.06009).
"""

import torch
from torch import Tensor

from wan_dist.models.attention.rotary import compute_rotary_tables
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer

DRIVING_TIMESTEPS = torch.tensor([[1.0]])
"""The driving video's, as `FusedTransformer.forward` takes them."""
SKIPPED_LAYER = 9
"""The block that the release leaves out for the negative prompt."""
MASK_CHANNELS = 4


def record_driving(
    model: FusedTransformer,
    latents: Tensor,
    context: ContextKV,
    *,
    first_column: int,
) -> None:
    """Pass a driving video through the transformer once, which keeps its keys and values in all blocks.

    latents (1, C, T, h, w) of its frames, all of which are given: they are the noisy ones too. ``context``:
    of its own prompt and image. Its positions follow those of the clip: one frame later, and from
    ``first_column`` on, the width of the clip's grid of tokens.
    """
    stream = model.driving
    assert stream is not None
    mask = torch.ones_like(latents[:, :MASK_CHANNELS])
    grid = [size // patch for size, patch in zip(latents.shape[2:], model.dims.patch, strict=True)]
    rotary = compute_rotary_tables(
        (grid[0], grid[1], grid[2]),
        model.dims.head_dim,
        device=latents.device,
        offset=(1, 0, first_column),
    )
    stream.is_recording = True
    try:
        model(torch.cat([latents, mask, latents], dim=1), DRIVING_TIMESTEPS, [context], rotary)
    finally:
        stream.is_recording = False
