"""Attention of blocks of queries to the blocks of keys that are selected for each.

On a GPU Triton kernels compute it, without copies of keys and values; elsewhere PyTorch, which gathers them.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels.dispatch import load_verified_kernels
from wan_dist.runtime.errors import get_first_line
from wan_dist.runtime.log import logger

_GATHERED_VALUES = 2**26
"""Values of keys, and as many of values, that PyTorch gathers at once."""
_SUMMED_TOKENS, _SUMMED_AT_ONCE, _SUM_WARPS = 1024, 64, 4
"""Tokens whose linear attention one program sums, and at once."""
_ADDED_AT_ONCE, _ADD_WARPS = 32, 4
"""Tokens to which one program adds linear attention."""
_SUPPORTED_HEAD_DIMS = (64, 128)
LINEAR_EPS = 1e-5
"""Added to the divisor of linear attention."""


class BlockSizes(NamedTuple):
    """Tokens of a block of queries and of one of keys."""

    query: int
    key: int


class LinearSums(NamedTuple):
    """What linear attention needs of keys and values, of B H heads, with a projection of its result.

    The product of softmax(k)ᵀ v and the projection's weight (B H, D, D), the sum of softmax(k) (B H, D),
    float32, and the projection's bias (D), with softmax over channels.
    """

    products: Tensor
    totals: Tensor
    bias: Tensor


def attend_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, selected_blocks: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Return softmax attention (N, l, D) of one head's N blocks of queries q (N, l, D), with PyTorch.

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


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return linear attention (Lq, D) of one head to all keys, with softmax over channels as feature map.

    q (Lq, D), k and v (Lk, D).
    """
    q_features, k_features = q.softmax(dim=-1), k.softmax(dim=-1)
    products = k_features.float().T @ v.float()
    divisors = LINEAR_EPS + q_features.float() @ k_features.sum(dim=0, dtype=torch.float32)
    return ((q_features.float() @ products) / divisors.unsqueeze(-1)).to(q.dtype)


def select_kernels(q: Tensor) -> ModuleType | None:
    """Return the Triton kernels if they work for queries such as q (B, L, H, D), else None."""
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[3] not in _SUPPORTED_HEAD_DIMS:
        return None
    return _load_kernels(q.device, q.dtype, q.shape[3])


def compile_kernels(device: torch.device, dtype: torch.dtype, dims: TransformerDims) -> None:
    """Compile and verify the kernels of a transformer now, rather than in its first step."""
    q = torch.empty(1, 1, 1, dims.head_dim, device=device, dtype=dtype)
    if select_kernels(q) is not None and dims.has_sla and dims.head_dim == 128:
        load_flash_attention(device)


def average_blocks(
    kernels: ModuleType, x: Tensor, size: int, *, means: Tensor | None = None
) -> Tensor:
    """Return the means (B, H, blocks, D) of x (B, L, H, D) in blocks, less the heads' ``means`` (B, H, D)."""
    return _run_average(kernels, x, size, -(-x.shape[1] // size), means=means)


def copy_tiles(kernels: ModuleType, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (B, L, H, D) in tiles (B, tiles * size, H, D), and their means (B, H, tiles, D).

    ``table`` (tiles, size), int64, has each tile's tokens, then -1 for none, whose slots are zeros.
    """
    batch, _, num_heads, width = x.shape
    tiles = x.new_empty(batch, num_heads, table.numel(), width)
    means = _run_average(kernels, x, table.shape[1], len(table), table=table, copy=tiles)
    return tiles.transpose(1, 2), means


def _run_average(
    kernels: ModuleType,
    x: Tensor,
    size: int,
    num_blocks: int,
    *,
    means: Tensor | None = None,
    table: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    batch, num_tokens, num_heads, width = x.shape
    out = x.new_empty(batch, num_heads, num_blocks, width)
    kernels.average_blocks_kernel[(num_blocks, batch * num_heads)](
        x, means, table, copy, out, num_tokens, num_heads, *x.stride()[:3], size=size, width=width,
        has_mean=means is not None, has_table=table is not None, has_copy=copy is not None,
    )  # fmt: skip
    return out


def sum_linear_attention(
    kernels: ModuleType, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor
) -> LinearSums:
    """Return the sums of k and v (B, L, H, D), and the projection of weight (D, D) and bias (D)."""
    batch, num_tokens, num_heads, width = k.shape
    num_parts = -(-num_tokens // _SUMMED_TOKENS)
    products = k.new_empty(num_parts, batch * num_heads, width, width, dtype=torch.float32)
    totals = products.new_empty(num_parts, batch * num_heads, width)
    kernels.sum_linear_kernel[(num_parts, batch * num_heads)](
        k, v, products, totals, num_tokens, num_heads, *k.stride()[:3], *v.stride()[:3],
        size=_SUMMED_AT_ONCE, times=_SUMMED_TOKENS // _SUMMED_AT_ONCE, width=width,
        num_warps=_SUM_WARPS,
    )  # fmt: skip
    return LinearSums((products.sum(0) @ weight.float().T).to(k.dtype), totals.sum(0), bias)


def attend_to_block_lists(
    kernels: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected_blocks: Tensor,
    sizes: BlockSizes,
    linear: LinearSums | None = None,
) -> Tensor:
    """Return softmax attention (B, Lq, H, D) of q (B, Lq, H, D) to selected blocks of k and v (B, Lk, H, D).

    ``selected_blocks`` (B, H, N, n). ``linear``: linear attention is added, divided by its sum and projected.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _run_attention(kernels, q, k, v, selected_blocks, sizes, out, linear=linear)
    return out


def attend_to_tiles(
    kernels: ModuleType,
    q: Tensor,
    k_tiles: Tensor,
    v_tiles: Tensor,
    selected_tiles: Tensor,
    coarse: Tensor,
    table: Tensor,
) -> Tensor:
    """Return (B, L, H, 2 D): softmax attention of q (B, L, H, D) to selected tiles, then ``coarse``.

    ``k_tiles``, ``v_tiles`` and ``table`` as in `copy_tiles`; ``selected_tiles`` (B, H, tiles, n), ``coarse``
    (B, H, tiles, D).
    """
    out = q.new_empty(*q.shape[:3], 2 * q.shape[3])
    sizes = BlockSizes(table.shape[1], table.shape[1])
    counts = (table >= 0).sum(1, dtype=torch.int32)
    _run_attention(
        kernels, q, k_tiles, v_tiles, selected_tiles, sizes, out, tiled=(table, counts, coarse)
    )
    return out


def _run_attention(
    kernels: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected_blocks: Tensor,
    sizes: BlockSizes,
    out: Tensor,
    *,
    tiled: tuple[Tensor, Tensor, Tensor] | None = None,
    linear: LinearSums | None = None,
) -> None:
    batch, num_queries, num_heads, width = q.shape
    num_blocks, num_selected = selected_blocks.shape[2:]
    kernels.attend_blocks_kernel[(num_blocks, batch * num_heads)](
        q, k, v, selected_blocks.int().contiguous(), *(tiled or [None] * 3), *(linear or [None] * 3), out,
        num_queries, k.shape[1], num_selected, num_heads, width**-0.5 / math.log(2), LINEAR_EPS,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        query_size=sizes.query, key_size=sizes.key, width=width,
        is_tiled=tiled is not None, has_linear=linear is not None,
        num_pipeline_stages=_count_stages(q, sizes), num_warps=4,  # the fastest on an H200
    )  # fmt: skip


def _count_stages(q: Tensor, sizes: BlockSizes) -> int:
    """Return how many blocks of keys and values are in shared memory at once, as many as are fast there."""
    if not q.is_cuda:
        return 1
    num_fastest = 5 if sizes.query == 64 else 2
    row_bytes = q.shape[3] * q.element_size()
    free_bytes = _get_shared_memory_bytes(q.device) - sizes.query * row_bytes
    return max(1, min(num_fastest, free_bytes // (2 * sizes.key * row_bytes)))


@cache
def _get_shared_memory_bytes(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def add_linear_attention_(kernels: ModuleType, out: Tensor, q: Tensor, linear: LinearSums) -> None:
    """Add linear attention of q (B, L, H, D) to out (B, L, H, D)."""
    batch, num_queries, num_heads, width = q.shape
    kernels.add_linear_kernel[(-(-num_queries // _ADDED_AT_ONCE), batch * num_heads)](
        q, *linear, out, num_queries, num_heads, LINEAR_EPS, *q.stride()[:3], *out.stride()[:3],
        size=_ADDED_AT_ONCE, width=width, num_warps=_ADD_WARPS,
    )  # fmt: skip


@cache
def load_flash_attention(device: torch.device) -> Callable[..., Tensor] | None:
    """Return FlashAttention-4's attention to blocks of 128 queries and 64 keys, None where it does not work.

    It takes q (B, Lq, H, 128), k and v (B, Lk, H, 128) and the selected blocks (B, H, N, n), ascending. On an
    H200 it is 1.3 to 1.5 times as fast as the Triton kernel.
    """
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        with _ignore_warnings():
            interface = importlib.import_module("flash_attn.cute.interface")
            lists = importlib.import_module(
                "flash_attn.cute.block_sparsity"
            ).BlockSparseTensorsTorch
        forward_pass = interface._flash_attn_fwd
    except (ImportError, AttributeError):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, selected_blocks: Tensor) -> Tensor:
        indices = selected_blocks.int().contiguous()
        counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32, device=q.device)
        # The last block of a list is masked to the number of keys, the others are whole.
        blocks = lists(torch.zeros_like(counts), indices, counts, indices, block_size=(128, 64))
        with _ignore_warnings():
            return cast(
                Tensor, forward_pass(q, k, v, tile_mn=(128, 64), block_sparse_tensors=blocks)[0]
            )

    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(
        3, 1, 200, 2, 128, generator=generator, device=device, dtype=torch.bfloat16
    )
    selected = torch.tensor([[[0, 3], [1, 2]], [[2, 3], [0, 1]]], device=device)[None]
    try:
        found = attend(q, k, v, selected).float()
    except Exception as error:  # kernels that are compiled here raise their compilers' own errors
        logger.warning("FlashAttention-4 does not attend to blocks here: %s", get_first_line(error))
        return None
    expected = _attend_masked(
        q, k, v, selected, _order_tokens(200, 128, device), _order_tokens(200, 64, device)
    )
    return attend if (found - expected).abs().max() < 2e-2 else None


@cache
def _load_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType | None:
    """Return the kernels if they attend, from 2 heads of 150 tokens, as PyTorch does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 150, 2, head_dim, generator=generator).to(device, dtype)
    weight, bias = torch.randn(2, head_dim, head_dim, generator=generator).to(device, dtype)
    selected = torch.tensor([[[0, 2], [1, 2], [0, 1]], [[1, 2], [0, 1], [0, 2]]], device=device)[
        None
    ]
    table = F.pad(torch.randperm(150, generator=generator).view(3, 50), (0, 14), value=-1)
    table, sizes = table.to(device), BlockSizes(64, 64)

    def run_trial(kernels: ModuleType | None) -> Tensor:
        if kernels is None:
            ordered = _order_tokens(150, 64, device)
            heads = zip(*(x[0].unbind(1) for x in (q, k, v)), strict=True)
            projected = torch.stack([attend_linearly(*qkv) for qkv in heads], dim=1)[None]
            projected = F.linear(projected, weight, bias[0])
            coarse = _average(k, table)
            return torch.cat([
                _attend_masked(q, k, v, selected, ordered, ordered) + projected,
                projected,
                _average(k - k.mean(dim=1, keepdim=True), ordered),
                coarse,
                _attend_masked(q, k, v, selected, table, table),
                coarse[:, _find_blocks(table)],
            ], dim=1)  # fmt: skip
        linear = sum_linear_attention(kernels, k, v, weight, bias[0])
        added = torch.zeros_like(q)
        add_linear_attention_(kernels, added, q, linear)
        means = average_blocks(kernels, k, 64, means=k.mean(dim=1))
        (k_tiles, k_means), (v_tiles, _) = (copy_tiles(kernels, x, table) for x in (k, v))
        tiled = attend_to_tiles(kernels, q, k_tiles, v_tiles, selected, k_means, table)
        return torch.cat([
            attend_to_block_lists(kernels, q, k, v, selected, sizes, linear),
            added,
            means.transpose(1, 2),
            k_means.transpose(1, 2),
            *tiled.chunk(2, dim=-1),
        ], dim=1)  # fmt: skip

    return load_verified_kernels("block_sparse_kernels", run_trial)


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    """FlashAttention-4's compiler warns about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _order_tokens(num_tokens: int, size: int, device: torch.device) -> Tensor:
    """Return the table (blocks, size) of tokens in order."""
    tokens = torch.arange(num_tokens, device=device)
    return F.pad(tokens, (0, -num_tokens % size), value=-1).view(-1, size)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, query_table: Tensor, key_table: Tensor
) -> Tensor:
    """Attention with a mask of all pairs of tokens, for few of them, in float32."""
    pairs = torch.zeros(*selected.shape[:3], len(key_table), dtype=torch.bool, device=q.device)
    pairs.scatter_(3, selected, value=True)
    mask = pairs[:, :, _find_blocks(query_table)][..., _find_blocks(key_table)]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _find_blocks(table: Tensor) -> Tensor:
    """Return each token's block."""
    return (table >= 0).nonzero()[:, 0][table[table >= 0].argsort()]


def _average(x: Tensor, table: Tensor) -> Tensor:
    """Return the means (B, blocks, H, D) of blocks of x (B, L, H, D)."""
    is_token = (table >= 0).unsqueeze(-1).unsqueeze(-1)
    return (x[:, table].float() * is_token).sum(2) / is_token.sum(1)
