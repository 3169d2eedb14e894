"""8-bit attention on Hopper: int8 scores, e4m3 weights and values, float32 sums.

It changes the result: see bench/NOTES.md. As in SageAttention 2 (arXiv:2411.10958), the mean of k over
all tokens is subtracted, to which softmax is invariant, and the sums of each block of keys are
accumulated in float32, since the tensor cores' own sums of e4m3 are less exact. The weights approximate
2^x linearly between powers of two through a float's bits (Schraudolph, Neural Computation 11, 1999), and
are normalised by the sum of the approximated weights.
"""

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

_KEY_BLOCK_SIZE = 128
"""Keys of a block, which share one int8 scale and are attended to at once."""
_QUERY_GROUP_SIZE = 64
"""Queries of a warp group; three warp groups make a program."""
_STATISTICS_KEYS = 512
"""Keys whose sum and maximum one program computes."""
_NUM_PIPELINE_STAGES = 4
"""Blocks of keys and values in shared memory, being fetched or in use."""


def attend_in_8bit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return an approximation of softmax(q kᵀ / √D) v, (B, Lq, H, 128).

    q (B, Lq, H, 128), k and v (B, Lk, H, 128), bfloat16 or float16. Raises RuntimeError on GPUs other
    than Hopper and for heads of another width, and Triton's own errors if it cannot compile the kernels.
    """
    if torch.cuda.get_device_capability(q.device) != (9, 0) or q.shape[3] != 128:
        raise RuntimeError(
            "needs a Hopper GPU and heads of 128 channels; attention=sage supports others"
        )
    return _run_8bit_attention(
        importlib.import_module("wan_dist.models.attention.eight_bit_kernels"), q, k, v
    )


def _run_8bit_attention(kernels: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, num_queries, num_heads, width = q.shape
    num_batch_heads = batch * num_heads
    int8_queries, query_scales = (
        q.new_empty(num_batch_heads, num_queries, width, dtype=torch.int8),
        q.new_empty(num_batch_heads, num_queries, dtype=torch.float32),
    )
    kernels.round_queries_kernel[(-(-num_queries // _KEY_BLOCK_SIZE), num_batch_heads)](
        q,
        int8_queries,
        query_scales,
        num_queries,
        num_heads,
        *q.stride()[:3],
        width**-0.5 / math.log(2),
        rows=_KEY_BLOCK_SIZE,
        num_warps=8,
    )
    int8_keys, key_scales, fp8_values, value_scales = _quantize_keys_values(kernels, k, v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernels.attend_kernel[(-(-num_queries // (3 * _QUERY_GROUP_SIZE)), num_batch_heads)](
        kernels.tiles_of(int8_queries, _QUERY_GROUP_SIZE),
        kernels.tiles_of(int8_keys, _KEY_BLOCK_SIZE),
        kernels.tiles_of(fp8_values, width),
        query_scales, key_scales, value_scales, out, num_queries, k.shape[1], int8_keys.shape[1], num_heads,
        stages=_NUM_PIPELINE_STAGES, num_warps=4,
    )  # fmt: skip
    return out


def _quantize_keys_values(
    kernels: ModuleType, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return k in int8 and a scale for each block, v in e4m3, transposed, and a scale for each channel.

    Shapes: (B H, L', 128), (B H, L' / 128), (B H, 128, L'), (B H, 128), where L' is Lk padded with zeros
    to a multiple of 128.
    """
    batch, num_keys, num_heads, width = k.shape
    num_batch_heads, num_blocks, num_groups = (
        batch * num_heads,
        -(-num_keys // _KEY_BLOCK_SIZE),
        -(-num_keys // _STATISTICS_KEYS),
    )
    key_sums, value_maxima = k.new_empty(2, num_groups, num_batch_heads, width, dtype=torch.float32)
    kernels.statistics_kernel[(num_groups, num_batch_heads)](
        k,
        v,
        key_sums,
        value_maxima,
        num_keys,
        num_heads,
        *k.stride()[:3],
        *v.stride()[:3],
        rows=64,
        times=_STATISTICS_KEYS // 64,
    )
    key_means = key_sums.sum(0) / num_keys
    value_scales = value_maxima.amax(0).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    int8_keys, key_scales = (
        k.new_empty(num_batch_heads, num_blocks * _KEY_BLOCK_SIZE, width, dtype=torch.int8),
        k.new_empty(num_batch_heads, num_blocks, dtype=torch.float32),
    )
    fp8_values = v.new_empty(
        num_batch_heads, width, num_blocks * _KEY_BLOCK_SIZE, dtype=torch.float8_e4m3fn
    )
    kernels.round_keys_kernel[(num_blocks, num_batch_heads)](
        k, v, key_means, value_scales, int8_keys, key_scales, fp8_values, num_keys, num_heads,
        *k.stride()[:3], *v.stride()[:3],
        rows=_KEY_BLOCK_SIZE, num_warps=8,
    )  # fmt: skip
    return int8_keys, key_scales, fp8_values, value_scales
