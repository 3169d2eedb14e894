"""Sparse-linear attention (SLA), which TurboWan's transformers were trained with (arXiv:2509.24006).

Each block of queries attends to the blocks of keys whose means score highest with its own, and a linear
attention to all keys is added, projected. Definitions are those of thu-ml/SLA at d973e55.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.block_sparse import (
    BlockSizes,
    add_linear_attention_,
    attend_linearly,
    attend_to_block_lists,
    attend_to_blocks,
    average_blocks,
    load_flash_attention,
    select_kernels,
    sum_linear_attention,
)
from wan_dist.models.attention.inner import InnerAttention

QUERY_BLOCK, KEY_BLOCK = 128, 64
"""Tokens of a block."""
DEFAULT_KEY_SHARE = 0.1
BLOCK_SIZES = BlockSizes(QUERY_BLOCK, KEY_BLOCK)


class SlaAttention(InnerAttention):
    """SLA as the inner attention of a block; its projection is a parameter of the block."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__(self._attend, "sla")
        self.key_share = DEFAULT_KEY_SHARE
        """Share of the key blocks that each query block attends to."""
        # In a tuple, as it is a module of the block and not of this one.
        self._projections = (projection,)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sparse_linear(q, k, v, self._projections[0], key_share=self.key_share)


def attend_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: nn.Linear,
    *,
    key_share: float,
    block_sizes: BlockSizes = BLOCK_SIZES,
) -> Tensor:
    """Return SLA (B, Lq, H, D) of q (B, Lq, H, D), k and v (B, Lk, H, D).

    ``projection`` maps D channels of the linear branch. Queries may be a part of all that begins at a block.
    """
    selected_blocks = select_key_blocks(q, k, key_share=key_share, block_sizes=block_sizes)
    kernels = select_kernels(q)
    if kernels is not None:
        linear = sum_linear_attention(kernels, k, v, projection.weight, projection.bias)
        attend = load_flash_attention(q.device) if q.shape[3] == 128 else None
        if attend is None or block_sizes != BLOCK_SIZES:
            return attend_to_block_lists(kernels, q, k, v, selected_blocks, block_sizes, linear)
        out = attend(q, k, v, selected_blocks)
        add_linear_attention_(kernels, out, q, linear)
        return out
    out = torch.empty_like(q)
    for batch_index in range(q.shape[0]):
        for head in range(q.shape[2]):
            head_q, head_k, head_v = (x[batch_index, :, head] for x in (q, k, v))
            out[batch_index, :, head] = _attend_to_selected(
                head_q, head_k, head_v, selected_blocks[batch_index, head], block_sizes
            )
            out[batch_index, :, head] += projection(attend_linearly(head_q, head_k, head_v))
    return out


def select_key_blocks(
    q: Tensor, k: Tensor, *, key_share: float, block_sizes: BlockSizes = BLOCK_SIZES
) -> Tensor:
    """Return the indices (B, H, query blocks, n), ascending, of the key blocks that are attended to.

    Those n whose mean, less that of all keys, has the largest product with the mean of the queries; at
    least one.
    """
    kernels = select_kernels(q)
    all_means = k.mean(dim=1, keepdim=True, dtype=torch.float32).to(k)
    if kernels is None:
        query_means = _average_blocks(q, block_sizes.query)
        key_means = _average_blocks(k - all_means, block_sizes.key)
    else:
        query_means = average_blocks(kernels, q, block_sizes.query)
        key_means = average_blocks(kernels, k, block_sizes.key, means=all_means)
    scores = query_means @ key_means.transpose(-1, -2)
    num_selected = max(1, min(scores.shape[-1], int(key_share * scores.shape[-1])))
    return scores.topk(num_selected, dim=-1, sorted=False).indices.sort(dim=-1).values


def _average_blocks(x: Tensor, block_size: int) -> Tensor:
    """x (B, L, H, D) -> means of blocks (B, H, blocks, D), in x's dtype; the last block may be shorter."""
    num_tokens = x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, -num_tokens % block_size))
    sums = padded.unflatten(1, (-1, block_size)).sum(dim=2, dtype=torch.float32)
    counts = torch.full((sums.shape[1],), block_size, device=x.device)
    counts[-1] = num_tokens - block_size * (len(counts) - 1)
    return (sums / counts.view(1, -1, 1, 1)).to(x.dtype).transpose(1, 2)


def _attend_to_selected(
    q: Tensor, k: Tensor, v: Tensor, selected_blocks: Tensor, block_sizes: BlockSizes
) -> Tensor:
    """Return softmax attention (Lq, D) of one head to the keys of the selected blocks (query blocks, n)."""
    num_queries, num_keys = len(q), len(k)
    key_mask = None
    if num_padding := -num_keys % block_sizes.key:
        is_key = torch.arange(num_keys + num_padding, device=k.device) < num_keys
        key_mask = is_key.unflatten(0, (-1, block_sizes.key))
    q_blocks, k_blocks, v_blocks = (
        F.pad(x, (0, 0, 0, -len(x) % size)).unflatten(0, (-1, size))
        for x, size in ((q, block_sizes.query), (k, block_sizes.key), (v, block_sizes.key))
    )
    out = attend_to_blocks(q_blocks, k_blocks, v_blocks, selected_blocks, key_mask)
    return out.flatten(0, 1)[:num_queries]
