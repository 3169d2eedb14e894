"""Triton kernels of attention/block_sparse.py: attention to lists of key blocks, and what SLA and VSA add.

A block has ``size`` slots: those of consecutive tokens, or of the tokens in a row of a table, -1 for none.
Heads of all videos are counted together.
"""

import triton
import triton.language as tl


@triton.jit
def _find_tokens(block, size: tl.constexpr, table_ptr, num_tokens, has_table: tl.constexpr):
    """Return the tokens of a block's slots, and which slots have one."""
    tokens = block.to(tl.int64) * size + tl.arange(0, size)
    if has_table:
        tokens = tl.load(table_ptr + tokens)
        return tokens, tokens >= 0
    else:  # noqa: RET505 (a constant decides)
        return tokens, tokens < num_tokens


@triton.jit
def _softmax_channels(x):
    """Return softmax over the channels of x, in x's dtype."""
    values = x.to(tl.float32)
    values = tl.exp(values - tl.max(values, 1)[:, None])
    return (values / tl.sum(values, 1)[:, None]).to(x.dtype)


@triton.jit
def average_blocks_kernel(
    x_ptr, mean_ptr, table_ptr, copy_ptr, out_ptr, num_tokens, num_heads, x_batch, x_row, x_head,
    size: tl.constexpr, width: tl.constexpr,
    has_mean: tl.constexpr, has_table: tl.constexpr, has_copy: tl.constexpr,
):  # fmt: skip
    """Write the mean of a block's tokens, each less the head's ``mean`` where there is one.

    ``copy`` (heads, blocks, size, D) is filled with the tokens, zeros where there is none.
    """
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, width)
    tokens, is_token = _find_tokens(tl.program_id(0), size, table_ptr, num_tokens, has_table)
    x_ptr += head // num_heads * x_batch + head % num_heads * x_head
    x = tl.load(x_ptr + tokens[:, None] * x_row + channel, mask=is_token[:, None], other=0.0)
    place = head * tl.num_programs(0) + tl.program_id(0)
    if has_copy:
        slots = place * size + tl.arange(0, size)
        tl.store(copy_ptr + slots[:, None] * width + channel, x)
    if has_mean:
        x = tl.where(is_token[:, None], x - tl.load(mean_ptr + head * width + channel), 0.0)
    total = tl.sum(x.to(tl.float32), 0) / tl.sum(is_token.to(tl.float32))
    tl.store(out_ptr + place * width + channel, total.to(out_ptr.dtype.element_ty))


@triton.jit
def sum_linear_kernel(
    k_ptr, v_ptr, product_ptr, total_ptr, num_tokens, num_heads,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    size: tl.constexpr, times: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sum softmax(k)ᵀ v (D, D) and softmax(k) (D) over size * times tokens, with softmax over channels."""
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, width)
    k_ptr += head // num_heads * k_batch + head % num_heads * k_head
    v_ptr += head // num_heads * v_batch + head % num_heads * v_head
    product = tl.zeros((width, width), tl.float32)
    total = tl.zeros((width,), tl.float32)
    for time in range(times):
        tokens = (tl.program_id(0) * times + time) * size + tl.arange(0, size).to(tl.int64)
        is_token = (tokens < num_tokens)[:, None]
        k = tl.load(k_ptr + tokens[:, None] * k_row + channel, mask=is_token, other=0.0)
        v = tl.load(v_ptr + tokens[:, None] * v_row + channel, mask=is_token, other=0.0)
        features = tl.where(is_token, _softmax_channels(k), 0.0).to(k.dtype)
        product = tl.dot(tl.trans(features), v, product)
        total += tl.sum(features.to(tl.float32), 0)
    place = tl.program_id(0) * tl.num_programs(1) + head
    tl.store(product_ptr + (place * width + channel)[:, None] * width + channel[None, :], product)
    tl.store(total_ptr + place * width + channel, total)


@triton.jit
def _attend_linearly(q, product_ptr, total_ptr, bias_ptr, head, eps, width: tl.constexpr):
    """Return softmax(q) P / (eps + softmax(q) t) + bias of the head's product P (D, D) and total t (D)."""
    channel = tl.arange(0, width)
    features = _softmax_channels(q)
    square = (head * width + channel)[:, None] * width + channel[None, :]
    product = tl.load(product_ptr + square).to(q.dtype)
    total = tl.load(total_ptr + head * width + channel)
    divisor = eps + tl.sum(features.to(tl.float32) * total[None, :], 1)
    out = tl.dot(features, product) / divisor[:, None]
    return out + tl.load(bias_ptr + channel).to(tl.float32)[None, :]


@triton.jit
def add_linear_kernel(
    q_ptr, product_ptr, total_ptr, bias_ptr, out_ptr, num_queries, num_heads, eps,
    q_batch, q_row, q_head, out_batch, out_row, out_head, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Add linear attention to out, as `_attend_linearly`."""
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, width)
    tokens = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    is_token = (tokens < num_queries)[:, None]
    q_ptr += head // num_heads * q_batch + head % num_heads * q_head
    out_ptr += head // num_heads * out_batch + head % num_heads * out_head
    q = tl.load(q_ptr + tokens[:, None] * q_row + channel, mask=is_token, other=0.0)
    places = out_ptr + tokens[:, None] * out_row + channel
    out = tl.load(places, mask=is_token, other=0.0).to(tl.float32)
    out += _attend_linearly(q, product_ptr, total_ptr, bias_ptr, head, eps, width)
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=is_token)


@triton.jit
def _add_keys(scores, v, highest, total, out):
    """Return the highest score, the sum of weights and that of weighted values with those of more keys."""
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    factor = tl.exp2(highest - new_highest)
    out = tl.dot(weights.to(v.dtype), v, out * factor[:, None])
    return new_highest, total * factor + tl.sum(weights, 1), out


@triton.jit
def attend_blocks_kernel(
    q_ptr, k_ptr, v_ptr, list_ptr, table_ptr, count_ptr, coarse_ptr, product_ptr, total_ptr, bias_ptr,
    out_ptr, num_queries, num_keys, num_listed, num_heads, scale, eps,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    query_size: tl.constexpr, key_size: tl.constexpr, width: tl.constexpr,
    is_tiled: tl.constexpr, has_linear: tl.constexpr, num_pipeline_stages: tl.constexpr,
):  # fmt: skip
    """Write softmax attention of a block of queries to its list of key blocks (FlashAttention-2's loop).

    ``scale`` is in base 2. With ``is_tiled``, queries lie as in the table, a key block begins with ``count``
    keys, and the block's row of ``coarse`` is written behind the channels of each query. With ``has_linear``,
    linear attention is added, as `_attend_linearly`.
    """
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, width)
    batch_index, head_index = head // num_heads, head % num_heads
    queries, is_query = _find_tokens(tl.program_id(0), query_size, table_ptr, num_queries, is_tiled)
    q_ptr += batch_index * q_batch + head_index * q_head
    k_ptr += batch_index * k_batch + head_index * k_head
    v_ptr += batch_index * v_batch + head_index * v_head
    place = head * tl.num_programs(0) + tl.program_id(0)
    list_ptr += place * num_listed
    q = tl.load(q_ptr + queries[:, None] * q_row + channel, mask=is_query[:, None], other=0.0)
    highest = tl.full((query_size,), -1e30, tl.float32)
    total = tl.zeros((query_size,), tl.float32)
    out = tl.zeros((query_size, width), tl.float32)
    slot = tl.arange(0, key_size)
    for index in tl.range(0, num_listed, num_stages=num_pipeline_stages):
        block = tl.load(list_ptr + index)
        keys = block.to(tl.int64) * key_size + slot
        if is_tiled:
            is_key = slot < tl.load(count_ptr + block)
            k = tl.load(k_ptr + keys[:, None] * k_row + channel)
            v = tl.load(v_ptr + keys[:, None] * v_row + channel)
        else:
            is_key = keys < num_keys
            k = tl.load(k_ptr + keys[:, None] * k_row + channel, mask=is_key[:, None], other=0.0)
            v = tl.load(v_ptr + keys[:, None] * v_row + channel, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(is_key[None, :], scores, -1e30)
        highest, total, out = _add_keys(scores, v, highest, total, out)
    out = out / total[:, None]
    if has_linear:
        out += _attend_linearly(q, product_ptr, total_ptr, bias_ptr, head, eps, width)
    out_ptr += batch_index * out_batch + head_index * out_head
    places = out_ptr + queries[:, None] * out_row + channel
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None])
    if is_tiled:
        coarse = tl.load(coarse_ptr + place * width + channel)
        tl.store(places + width, tl.zeros_like(q) + coarse[None, :], mask=is_query[:, None])
