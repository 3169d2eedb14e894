"""8-bit attention kernels of eight_bit.py: quantisation in Triton, attention in warp-specialised Gluon.

A program attends from 192 queries of a head: three groups of four warps have 64 queries each, and a
fourth group, of one warp, fetches keys and values for all of them. ``slot``: the tensor cores read weights
in another order than that in which they produce scores, so values are stored in the order of the weights.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# 1.5 * 2^23: an integer below 2^22 plus the bits of this float are the bits of the float SHIFT + integer.
SHIFT = gl.constexpr(12582912.0)
SHIFT_BITS = gl.constexpr(0x4B400000)
ONE = gl.constexpr(0x38)  # in e4m3
HIGHEST = gl.constexpr(120.0)  # the bits of 2^8 in e4m3: the largest weight


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Return x (N, M, K), one byte for each value, as tiles of ``rows`` rows and 128 columns."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [rows, 128], layout)


@triton.jit
def place_of(slot):
    """Return the column of the scores to which a slot belongs; slots are permuted in groups of 16."""
    return slot // 16 * 16 + 8 * (slot % 4 // 2) + 2 * (slot % 16 // 4) + slot % 2


@triton.jit
def statistics_kernel(
    k_ptr, v_ptr, sum_ptr, most_ptr, num_keys, num_heads,
    k_batch, k_row, k_head, v_batch, v_row, v_head, rows: tl.constexpr, times: tl.constexpr,
):  # fmt: skip
    """Sum of k and largest magnitude of v, by channel, over rows * times keys of a head."""
    head = tl.program_id(1)
    k_ptr += head // num_heads * k_batch.to(tl.int64) + head % num_heads * k_head
    v_ptr += head // num_heads * v_batch.to(tl.int64) + head % num_heads * v_head
    channel = tl.arange(0, 128)
    total, most = tl.zeros((128,), tl.float32), tl.zeros((128,), tl.float32)
    for time in range(times):
        key = (tl.program_id(0) * times + time) * rows + tl.arange(0, rows).to(tl.int64)
        inside = (key < num_keys)[:, None]
        total += tl.sum(
            tl.load(k_ptr + key[:, None] * k_row + channel, mask=inside, other=0.0).to(tl.float32),
            0,
        )
        v = tl.load(v_ptr + key[:, None] * v_row + channel, mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(v), 0))
    place = (tl.program_id(0) * tl.num_programs(1) + head) * 128 + channel
    tl.store(sum_ptr + place, total)
    tl.store(most_ptr + place, most)


@triton.jit
def round_queries_kernel(
    q_ptr, out_ptr, scale_ptr, num_queries, num_heads, q_batch, q_row, q_head, factor, rows: tl.constexpr
):  # fmt: skip
    """Round each query to int8 with a scale of its own, which is stored multiplied by ``factor``."""
    head, channel = tl.program_id(1), tl.arange(0, 128)
    query = tl.program_id(0) * rows + tl.arange(0, rows).to(tl.int64)
    inside = query < num_queries
    q_ptr += head // num_heads * q_batch.to(tl.int64) + head % num_heads * q_head
    q = tl.load(q_ptr + query[:, None] * q_row + channel, mask=inside[:, None], other=0.0).to(
        tl.float32
    )
    scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-12) / 127
    place = head.to(tl.int64) * num_queries + query
    tl.store(scale_ptr + place, scale * factor, mask=inside)
    q = tl.floor(q * (1 / scale)[:, None] + 0.5)
    tl.store(out_ptr + place[:, None] * 128 + channel, q.to(tl.int8), mask=inside[:, None])


@triton.jit
def round_keys_kernel(
    k_ptr, v_ptr, mean_ptr, value_scale_ptr, keys_ptr, key_scale_ptr, values_ptr, num_keys, num_heads,
    k_batch, k_row, k_head, v_batch, v_row, v_head, rows: tl.constexpr,
):  # fmt: skip
    """Round a block of k minus its mean to int8, and of v to e4m3 in the order of slots, tokens last."""
    head, channel, slot = tl.program_id(1), tl.arange(0, 128), tl.arange(0, rows)
    first = tl.program_id(0).to(tl.int64) * rows
    all_keys = tl.num_programs(0).to(tl.int64) * rows
    inside = (first + slot < num_keys)[:, None]
    k_ptr += head // num_heads * k_batch.to(tl.int64) + head % num_heads * k_head
    k = tl.load(k_ptr + (first + slot)[:, None] * k_row + channel, mask=inside, other=0.0).to(
        tl.float32
    )
    k = tl.where(inside, k - tl.load(mean_ptr + head * 128 + channel), 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), 1e-12) / 127
    tl.store(key_scale_ptr + head * tl.num_programs(0) + tl.program_id(0), scale)
    tl.store(
        keys_ptr + (head * all_keys + first + slot)[:, None] * 128 + channel,
        tl.floor(k * (1 / scale) + 0.5).to(tl.int8),
    )
    key = first + place_of(slot)
    v_ptr += head // num_heads * v_batch.to(tl.int64) + head % num_heads * v_head
    v = tl.load(
        v_ptr + key[:, None] * v_row + channel, mask=(key < num_keys)[:, None], other=0.0
    ).to(tl.float32)
    v = tl.trans(
        (v * (1 / tl.load(value_scale_ptr + head * 128 + channel))).to(values_ptr.dtype.element_ty)
    )
    tl.store(values_ptr + (head.to(tl.int64) * 128 + channel)[:, None] * all_keys + first + slot, v)


@gluon.jit
def _weigh(scores, scale, highest, weights_layout: gl.constexpr):
    """Return weights 2^(8 + score * scale - highest) in e4m3, the new highest, and the factor for older sums.

    scores: int32, read as the float SHIFT + score. The bits of an e4m3 number x are 8 * (7 + log2 x), linear
    between powers of two. That integer times the smallest float16 is rounded to float16, negative numbers to
    0; the bits of the result are then the integer.
    """
    shifted = scores.to(gl.float32, bitcast=True)
    new = gl.maximum(highest, (gl.max(shifted, 1) - SHIFT) * scale)
    slope = scale * 2.0**-21
    offset = (HIGHEST - new * 8) * 2.0**-24 - SHIFT * slope
    x = shifted * slope[:, None] + offset[:, None]
    rows: gl.constexpr = x.shape[0]
    x = (
        x.reshape(rows, x.shape[1] // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows, x.shape[1])
    )  # columns of the scores to slots
    weights = gl.inline_asm_elementwise(
        "{ .reg .b32 x, y; cvt.rn.relu.f16x2.f32 x, $2, $1; cvt.rn.relu.f16x2.f32 y, $4, $3; "
        "prmt.b32 $0, x, y, 0x6420; }",
        "=r,f,f,f,f",
        [gl.convert_layout(x, weights_layout, assert_trivial=True)],
        dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
    return weights, new, gl.exp2(highest - new)


@gluon.jit
def _attend(
    group: gl.constexpr,
    shared,
    ones,
    barriers,
    scale_ptrs,
    out_ptr,
    num_queries,
    num_blocks,
    num_heads,
):
    """Attend from 64 queries. The last block of keys, which may be padded with zeros, comes first.

    The highest score starts at 0, since scores are 0 on average: the mean of k has been subtracted.
    """
    queries, keys, values = shared
    query_ready, key_ready, key_free, value_ready, value_free = barriers
    query_scale_ptr, key_scale_ptr, value_scale_ptr = scale_ptrs
    stages: gl.constexpr = keys.shape[0]
    rows: gl.constexpr = keys.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    head = gl.program_id(1)
    first = (gl.program_id(0) * 3 + group) * 64
    query = first + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
    query_scale = gl.load(
        query_scale_ptr + head.to(gl.int64) * num_queries + query,
        mask=query < num_queries,
        other=0.0,
    )
    highest = gl.zeros((64,), gl.float32, gl.SliceLayout(1, scores_layout))
    out = gl.zeros((64, 128), gl.float32, out_layout)
    total = gl.zeros((64, 8), gl.float32, sum_layout)
    mbarrier.wait(query_ready, 0)
    for i in range(num_blocks):
        stage = i % stages
        phase = i // stages & 1
        key_scale = gl.load(key_scale_ptr + head * num_blocks + num_blocks - 1 - i)
        mbarrier.wait(key_ready.index(stage), phase)
        scores = gl.full((64, rows), SHIFT_BITS, gl.int32, scores_layout)
        scores = warpgroup_mma(
            queries.index(group), keys.index(stage).permute((1, 0)), scores, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(key_free.index(stage), count=1)
        weights, highest, factor = _weigh(
            scores, query_scale * key_scale, highest, gl.DotOperandLayout(0, out_layout, 4)
        )
        mbarrier.wait(value_ready.index(stage), phase)
        added = warpgroup_mma(
            weights, values.index(stage).permute((1, 0)), gl.zeros((64, 128), gl.float32, out_layout),
            use_acc=False, is_async=True, max_num_imprecise_acc=rows,
        )  # fmt: skip
        counted = warpgroup_mma(  # the sum of the weights as rounded
            gl.convert_layout(weights, gl.DotOperandLayout(0, sum_layout, 4), assert_trivial=True),
            ones.index(gl.minimum(i, 1)).permute((1, 0)), gl.zeros((64, 8), gl.float32, sum_layout),
            use_acc=False, is_async=True, max_num_imprecise_acc=rows,
        )  # fmt: skip
        added, counted = warpgroup_mma_wait(0, deps=[added, counted])
        mbarrier.arrive(value_free.index(stage), count=1)
        out = out * gl.convert_layout(factor, gl.SliceLayout(1, out_layout))[:, None] + added
        total = total * gl.convert_layout(factor, gl.SliceLayout(1, sum_layout))[:, None] + counted
    channel = gl.arange(0, 128, gl.SliceLayout(0, out_layout))
    out *= gl.convert_layout(1 / gl.max(total, 1), gl.SliceLayout(1, out_layout))[:, None]
    out *= gl.load(value_scale_ptr + head * 128 + channel)[None, :]
    query = first + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
    place = ((head // num_heads).to(gl.int64) * num_queries + query) * num_heads + head % num_heads
    gl.store(
        out_ptr + place[:, None] * 128 + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(query < num_queries)[:, None],
    )


@gluon.jit
def _fetch(query_tiles, key_tiles, value_tiles, shared, barriers, num_queries, num_blocks):
    """Fetch 192 queries, then keys and values block by block, as soon as a stage is free."""
    queries, keys, values = shared
    query_ready, key_ready, key_free, value_ready, value_free = barriers
    stages: gl.constexpr = keys.shape[0]
    rows: gl.constexpr = keys.shape[1]
    head = gl.program_id(1)
    mbarrier.expect(query_ready, 3 * 64 * 128)
    for group in gl.static_range(3):
        place = head * num_queries + (gl.program_id(0) * 3 + group) * 64
        tma.async_copy_global_to_shared(query_tiles, [place, 0], query_ready, queries.index(group))
    for i in range(num_blocks):
        stage = i % stages
        phase = i // stages & 1 ^ 1
        block = num_blocks - 1 - i
        mbarrier.wait(key_free.index(stage), phase)
        mbarrier.expect(key_ready.index(stage), rows * 128)
        tma.async_copy_global_to_shared(
            key_tiles,
            [(head * num_blocks + block) * rows, 0],
            key_ready.index(stage),
            keys.index(stage),
        )
        mbarrier.wait(value_free.index(stage), phase)
        mbarrier.expect(value_ready.index(stage), rows * 128)
        tma.async_copy_global_to_shared(
            value_tiles, [head * 128, block * rows], value_ready.index(stage), values.index(stage)
        )


@gluon.jit
def attend_kernel(
    query_tiles, key_tiles, value_tiles, query_scale_ptr, key_scale_ptr, value_scale_ptr, out_ptr,
    num_queries, num_keys, all_keys, num_heads, stages: gl.constexpr,
):  # fmt: skip
    """Attend from 192 queries of a head to all keys; see `_attend`."""
    rows: gl.constexpr = key_tiles.block_type.shape[0]
    queries = gl.allocate_shared_memory(gl.int8, [3, 64, 128], query_tiles.layout)
    keys = gl.allocate_shared_memory(gl.int8, [stages, rows, 128], key_tiles.layout)
    values = gl.allocate_shared_memory(gl.float8e4nv, [stages, 128, rows], value_tiles.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    # Ones for the keys of the last block, which may be short, and of the other blocks.
    ones = gl.allocate_shared_memory(gl.float8e4nv, [2, 8, rows], value_tiles.layout)
    place = all_keys - rows + place_of(gl.arange(0, rows, gl.SliceLayout(0, layout)))
    one = gl.full((8, rows), ONE, gl.int8, layout)
    ones.index(0).store(
        gl.where((place < num_keys)[None, :], one, 0).to(gl.int8).to(gl.float8e4nv, bitcast=True)
    )
    ones.index(1).store(one.to(gl.float8e4nv, bitcast=True))
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, count=1)
    for stage in gl.static_range(stages):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=3)
        mbarrier.init(value_free.index(stage), count=3)
    fence_async_shared()
    barriers = (query_ready, key_ready, key_free, value_ready, value_free)
    shared, num_blocks = (queries, keys, values), all_keys // rows
    scale_ptrs = (query_scale_ptr, key_scale_ptr, value_scale_ptr)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    gl.constexpr(0),
                    shared,
                    ones,
                    barriers,
                    scale_ptrs,
                    out_ptr,
                    num_queries,
                    num_blocks,
                    num_heads,
                ),
            ),
            (
                _attend,
                (
                    gl.constexpr(1),
                    shared,
                    ones,
                    barriers,
                    scale_ptrs,
                    out_ptr,
                    num_queries,
                    num_blocks,
                    num_heads,
                ),
            ),
            (
                _attend,
                (
                    gl.constexpr(2),
                    shared,
                    ones,
                    barriers,
                    scale_ptrs,
                    out_ptr,
                    num_queries,
                    num_blocks,
                    num_heads,
                ),
            ),
            (
                _fetch,
                (query_tiles, key_tiles, value_tiles, shared, barriers, num_queries, num_blocks),
            ),
        ],
        worker_num_warps=[4, 4, 1],
        worker_num_regs=[160, 160, 24],
    )
