"""Triton kernels of vae/ops.py: fused norm and SiLU, residual addition, phase interleaving.

A program processes ``block_p`` pixels with all their channels, which are innermost in memory. Each video
(1, C, F, H, W) is passed as a pointer and its strides over frames, rows and columns.
"""

import triton
import triton.language as tl


@triton.jit
def _block(num_pixels, channels: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr):
    """Return the pixels and channels of this program, and the mask of those that exist."""
    pixel = tl.program_id(0) * block_p + tl.arange(0, block_p)
    channel = tl.arange(0, block_c)
    return pixel, channel, (pixel < num_pixels)[:, None] & (channel < channels)[None, :]


@triton.jit
def _place(pixel, height, width):
    return (pixel // (height * width)).to(tl.int64), pixel // width % height, pixel % width


@triton.jit
def _at(pointer, pixel, channel, height, width, stride_f, stride_h, stride_w):
    frame, row, column = _place(pixel, height, width)
    return (
        pointer
        + (frame * stride_f + row * stride_h + column * stride_w)[:, None]
        + channel[None, :]
    )


@triton.jit
def _load(pointers, mask, bias_ptr, channel, channels: tl.constexpr, has_bias: tl.constexpr):
    """Return the values at ``pointers`` plus the bias of their channels, in float32."""
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        value += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[
            None, :
        ]
    return value


@triton.jit
def activate_kernel(
    x_ptr, out_ptr, bias_ptr, gamma_ptr,
    x_f, x_h, x_w, out_f, out_h, out_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel, channel, mask = _block(num_pixels, channels, block_p, block_c)
    x = _load(
        _at(x_ptr, pixel, channel, height, width, x_f, x_h, x_w),
        mask,
        bias_ptr,
        channel,
        channels,
        has_bias,
    )
    gamma = tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    y = x / tl.maximum(norm, 1e-12)[:, None] * gamma[None, :]
    y = y * tl.sigmoid(y)
    tl.store(
        _at(out_ptr, pixel, channel, height, width, out_f, out_h, out_w),
        y.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def add_kernel(
    x_ptr, y_ptr, bias_ptr,
    x_f, x_h, x_w, y_f, y_h, y_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel, channel, mask = _block(num_pixels, channels, block_p, block_c)
    at_x = _at(x_ptr, pixel, channel, height, width, x_f, x_h, x_w)
    x = _load(at_x, mask, bias_ptr, channel, channels, False)
    y = _load(
        _at(y_ptr, pixel, channel, height, width, y_f, y_h, y_w),
        mask,
        bias_ptr,
        channel,
        channels,
        has_bias,
    )
    tl.store(at_x, (x + y).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def interleave_kernel(
    out_ptr, x_ptr, bias_ptr,
    out_f, out_h, out_w, x_f, x_h, x_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel, channel, mask = _block(num_pixels, channels, block_p, block_c)
    frame, row, column = _place(pixel, height, width)
    # An odd row comes from the window one further down. The index of a phase, each with its own channels, is
    # 2 * (odd row) + (odd column).
    source = (
        frame * x_f
        + (row // 2 + row % 2) * x_h
        + (column // 2 + column % 2) * x_w
        + (row % 2 * 2 + column % 2) * channels
    )
    value = _load(
        x_ptr + source[:, None] + channel[None, :], mask, bias_ptr, channel, channels, has_bias
    )
    tl.store(
        _at(out_ptr, pixel, channel, height, width, out_f, out_h, out_w),
        value.to(out_ptr.dtype.element_ty),
        mask=mask,
    )
