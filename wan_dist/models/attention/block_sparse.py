"""Attention of blocks of queries to the blocks of keys that are selected for each."""

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHERED_VALUES = 2**26
"""Values of keys, and as many of values, that are gathered at once."""


def attend_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, selected_blocks: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Return softmax attention (N, l, D) of one head's N blocks of queries q (N, l, D).

    k and v (M, m, D) are blocks of keys and values, ``selected_blocks`` (N, n) those that each block of
    queries attends to. ``key_mask`` (M, m) is False where a block has no key. The selected ones are gathered,
    a part of the queries at a time.
    """
    values_per_block = selected_blocks.shape[1] * k.shape[1] * k.shape[2]
    num_at_once = max(1, _GATHERED_VALUES // values_per_block)
    outputs = []
    for start in range(0, len(q), num_at_once):
        blocks = selected_blocks[start : start + num_at_once]
        out = F.scaled_dot_product_attention(
            q[start : start + num_at_once, None],
            k[blocks].flatten(1, 2)[:, None],
            v[blocks].flatten(1, 2)[:, None],
            attn_mask=None if key_mask is None else key_mask[blocks].flatten(1)[:, None, None],
        )
        outputs.append(out.squeeze(1))
    return torch.cat(outputs)
