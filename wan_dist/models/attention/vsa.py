"""Video sparse attention (VSA), which FastWan's transformers were trained with (arXiv:2505.13389).

Tokens lie in tiles of 4 x 4 x 4. Each tile of queries attends to the tiles of keys whose means score highest
with its own; the attention between the means of all tiles is added, times a gate. Definitions are those of
hao-ai-lab/FastVideo at 2f3d407.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.attention.block_sparse import (
    attend_to_blocks,
    attend_to_tiles,
    copy_tiles,
    select_kernels,
)
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims

TILE_SIDE = 4
_NARROW_DIM = 1536
"""Width of the 1.3B model."""
_TILE_TOKENS = TILE_SIDE**3


class VsaAttention(InnerAttention):
    """VSA as the inner attention of a block, before the gate."""

    accepts_partial_queries = False

    def __init__(self) -> None:
        super().__init__(self._attend, "vsa")
        self.grid = (0, 0, 0)
        """Tokens of the video: frames, rows and columns."""
        self.sparsity = 0.0
        """Share of the key tiles that a query tile does not attend to."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_in_tiles(q, k, v, self.grid, sparsity=self.sparsity)


def choose_vsa_sparsity(requested: float | None, dims: TransformerDims) -> float:
    """Return the share of key tiles that is left out: as requested, or as the published models have it."""
    if requested is not None:
        return requested
    return 0.8 if dims.dim <= _NARROW_DIM else 0.9


def attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], *, sparsity: float
) -> Tensor:
    """Return (B, L, H, 2 D): the sparse, then the coarse attention of q, k and v (B, L, H, D).

    ``grid``: (t, h, w) with L tokens in this order.
    """
    token_indices, token_mask, places = _index_tiles(grid, q.device)
    if (kernels := select_kernels(q)) is not None:
        table = torch.where(token_mask, token_indices, -1)
        (_, q_means), (k_tiles, k_means), (v_tiles, v_means) = (
            copy_tiles(kernels, x, table) for x in (q, k, v)
        )
        selected, coarse = _attend_to_means(q_means, k_means, v_means, sparsity)
        return attend_to_tiles(kernels, q, k_tiles, v_tiles, selected, coarse, table)
    out = q.new_empty(*q.shape[:3], 2 * q.shape[3])
    for batch_index in range(q.shape[0]):
        for head in range(q.shape[2]):
            # (tiles, 64, D)
            q_tiles, k_tiles, v_tiles = (x[batch_index, :, head][token_indices] for x in (q, k, v))
            q_means, k_means, v_means = (
                _average_tiles(x, token_mask) for x in (q_tiles, k_tiles, v_tiles)
            )
            selected, coarse = _attend_to_means(q_means, k_means, v_means, sparsity)
            sparse = attend_to_blocks(q_tiles, k_tiles, v_tiles, selected, token_mask)
            head_out = torch.cat([sparse, coarse.unsqueeze(1).expand_as(sparse)], dim=-1)
            out[batch_index, :, head] = head_out.flatten(0, 1)[places]
    return out


def _attend_to_means(q: Tensor, k: Tensor, v: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Return the key tiles (..., tiles, n) of each query tile, and attention (..., tiles, D) between means.

    q, k and v (..., tiles, D).
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    num_selected = count_selected_tiles(scores.shape[-1], sparsity)
    coarse = scores.float().softmax(dim=-1).to(v.dtype) @ v
    return scores.topk(num_selected, dim=-1, sorted=False).indices, coarse


def count_selected_tiles(num_tiles: int, sparsity: float) -> int:
    """Return to how many of the key tiles a query tile attends."""
    return max(1, min(math.ceil((1 - sparsity) * num_tiles), num_tiles))


@lru_cache(8)
def _index_tiles(grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices (tiles, 64) of each tile's tokens, and where there is one: edge tiles end sooner.

    Then the place (L,) of each token in the tiles.
    """
    padded_grid = [-(-size // TILE_SIDE) * TILE_SIDE for size in grid]
    indices = torch.arange(math.prod(grid), device=device).view(grid)
    padding = [
        amount
        for padded, size in zip(reversed(padded_grid), reversed(grid), strict=True)
        for amount in (0, padded - size)
    ]
    indices = F.pad(indices, padding, value=-1)
    for dim in (0, 2, 4):
        indices = indices.unflatten(dim, (-1, TILE_SIDE))
    indices = indices.permute(0, 2, 4, 1, 3, 5).reshape(-1, _TILE_TOKENS)
    indices = indices.gather(1, (indices < 0).long().argsort(dim=1, stable=True))
    token_mask = indices >= 0
    places = token_mask.flatten().nonzero().squeeze(1)
    return indices.clamp_min(0), token_mask, places[indices[token_mask].argsort()]


def _average_tiles(x: Tensor, token_mask: Tensor) -> Tensor:
    """x (tiles, 64, D) -> means (tiles, D) of the tokens that there are."""
    sums = (x.float() * token_mask.unsqueeze(-1)).sum(dim=1)
    return (sums / token_mask.sum(dim=1, keepdim=True)).to(x.dtype)
