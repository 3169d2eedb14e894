"""Triton kernels of transformer_ops.py, quantized_linear.py and attention/cross.py.

A program processes one token with all its channels; in cross-attention, a block of tokens of one head.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr, rounding_ptr,
    x_row, y_row, gate_row, scale_row, num_first, eps, most,
    width: tl.constexpr, has_y: tl.constexpr, has_gate: tl.constexpr, has_norm: tl.constexpr,
    plus_one: tl.constexpr, is_rounded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """x += gate * y; out = layer_norm(x) * scale + shift, rounded as in `round_kernel` or not.

    Tokens from ``num_first`` on use the second row of gate, scale and shift.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    inside = channel < width
    segment = (token >= num_first).to(tl.int64)
    x = tl.load(x_ptr + token * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if has_y:
        y = tl.load(y_ptr + token * y_row + channel, mask=inside, other=0.0).to(tl.float32)
        if has_gate:
            y *= tl.load(gate_ptr + segment * gate_row + channel, mask=inside, other=0.0)
        rounded = (x + y).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * x_row + channel, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if has_norm:
        centred = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
        normed = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        scale = tl.load(scale_ptr + segment * scale_row + channel, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + segment * scale_row + channel, mask=inside, other=0.0)
        if plus_one:
            scale += 1.0
        out = normed * scale + shift
        if is_rounded:
            rounding = tl.maximum(tl.max(tl.where(inside, tl.abs(out), 0.0), axis=0), 1e-12) / most
            tl.store(rounding_ptr + token, rounding)
            out *= 1 / rounding
        tl.store(out_ptr + token * width + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_kernel(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, x_row, out_row, out_part, eps,
    width: tl.constexpr, part: tl.constexpr, pairs: tl.constexpr, has_rotary: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(x) * weight, then each pair of neighbouring channels is rotated by its token's angles.

    A head has ``pairs`` pairs. A token of out is stored in parts of ``part`` channels, ``out_part`` apart.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    inside = channel < width
    x = tl.load(x_ptr + token * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / width + eps) * weight
    if has_rotary:
        even, odd = tl.split(tl.reshape(x, (block // 2, 2)))
        place = tl.arange(0, block // 2) % pairs
        cos = tl.load(cos_ptr + token * pairs + place)
        sin = tl.load(sin_ptr + token * pairs + place)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (block,))
    place = token * out_row + channel // part * out_part + channel % part
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_kernel(
    x_ptr, out_ptr, scale_ptr, x_row, most,
    width: tl.constexpr, has_gelu: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out = x / scale, or gelu(x) / scale, with each token's scale such that its maximum is ``most``."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    inside = channel < width
    x = tl.load(x_ptr + token * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if has_gelu:
        # (1 + tanh z) / 2 is the sigmoid of 2 z.
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / most
    tl.store(scale_ptr + token, scale)
    tl.store(
        out_ptr + token * width + channel,
        (x * (1 / scale)).to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def cross_attend_kernel(
    q_ptr, text_k_ptr, text_v_ptr, image_k_ptr, image_v_ptr, out_ptr,
    q_row, q_head, text_k_row, text_k_head, text_v_row, text_v_head,
    image_k_row, image_k_head, image_v_row, image_v_head, out_row,
    num_tokens, num_text, num_image, last_bias, scale,
    width: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """out = attention to the text plus attention to the images; scores are in base 2.

    ``last_bias`` is added to the score of the text's last key, which stands for several padding keys.
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channel = tl.arange(0, width)
    inside = (token < num_tokens)[:, None]
    q = tl.load(
        q_ptr + token[:, None] * q_row + head * q_head + channel[None, :], mask=inside, other=0.0
    )
    out = _attended(
        q, text_k_ptr + head * text_k_head, text_v_ptr + head * text_v_head, text_k_row, text_v_row,
        num_text, last_bias, scale, width, rows, keys,
    )  # fmt: skip
    if num_image > 0:
        out += _attended(
            q, image_k_ptr + head * image_k_head, image_v_ptr + head * image_v_head, image_k_row, image_v_row,
            num_image, 0.0, scale, width, rows, keys,
        )  # fmt: skip
    tl.store(
        out_ptr + token[:, None] * out_row + head * width + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _attended(
    q, k_ptr, v_ptr, k_row, v_row, num_keys, last_bias, scale,
    width: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr
):  # fmt: skip
    """Attention of q (rows, width) to blocks of keys with a running maximum (arXiv:2205.14135); float32."""
    channel = tl.arange(0, width)
    most = tl.full((rows,), -float("inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    out = tl.zeros((rows, width), tl.float32)
    for first in range(0, num_keys, keys):
        key = first + tl.arange(0, keys)
        there = key < num_keys
        k = tl.load(k_ptr + key[:, None] * k_row + channel[None, :], mask=there[:, None], other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_row + channel[None, :], mask=there[:, None], other=0.0)
        scores = (
            tl.dot(q, tl.trans(k)) * scale + tl.where(key == num_keys - 1, last_bias, 0.0)[None, :]
        )
        scores = tl.where(there[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        most = higher
    return out / total[:, None]
