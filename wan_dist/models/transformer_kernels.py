"""Triton kernels of transformer_elementwise.py and quantized.py. A program takes one token with all its channels."""

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr,
    x_row, y_row, gate_row, scale_row, num_first, eps,
    width: tl.constexpr, has_y: tl.constexpr, has_gate: tl.constexpr, has_norm: tl.constexpr, plus_one: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """x += gate * y; out = layer_norm(x) * scale + shift. Tokens from ``num_first`` on take the second row of gate, scale and shift."""
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
        tl.store(out_ptr + token * width + channel, (normed * scale + shift).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, x_row, eps,
    width: tl.constexpr, pairs: tl.constexpr, has_rotary: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """x = rms_norm(x) * weight, then each pair of neighbours is rotated by its token's angles; heads have ``pairs`` pairs."""
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
    tl.store(x_ptr + token * x_row + channel, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_kernel(
    x_ptr, out_ptr, scale_ptr, x_row, most,
    width: tl.constexpr, has_gelu: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out = x / scale, or gelu(x) / scale, such that its largest value is ``most``."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    inside = channel < width
    x = tl.load(x_ptr + token * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if has_gelu:
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh z) / 2 is the sigmoid of 2 z
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / most
    tl.store(scale_ptr + token, scale)
    tl.store(out_ptr + token * width + channel, (x / scale).to(out_ptr.dtype.element_ty), mask=inside)
