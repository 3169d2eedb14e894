"""Triton kernels of vae_elementwise.py. A program takes ``block_p`` pixels with all their channels, which are innermost in memory.

Each video (1, C, F, H, W) is a pointer and its strides over frames, rows and columns.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(pixel, height, width, stride_f, stride_h, stride_w):
    frame = pixel // (height * width)
    row = pixel // width % height
    return frame.to(tl.int64) * stride_f + row * stride_h + pixel % width * stride_w


@triton.jit
def activate_kernel(
    x_ptr, out_ptr, bias_ptr, gamma_ptr,
    x_f, x_h, x_w, out_f, out_h, out_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * block_p + tl.arange(0, block_p)
    channel = tl.arange(0, block_c)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + _offsets(pixel, height, width, x_f, x_h, x_w)[:, None] + channel[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if has_bias:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    gamma = tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    y = x / tl.maximum(norm, 1e-12)[:, None] * gamma[None, :]
    y = y * tl.sigmoid(y)
    at = out_ptr + _offsets(pixel, height, width, out_f, out_h, out_w)[:, None] + channel[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_kernel(
    x_ptr, y_ptr, out_ptr, bias_ptr,
    x_f, x_h, x_w, y_f, y_h, y_w, out_f, out_h, out_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * block_p + tl.arange(0, block_p)
    channel = tl.arange(0, block_c)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + _offsets(pixel, height, width, x_f, x_h, x_w)[:, None] + channel[None, :], mask=mask, other=0.0)
    y = tl.load(y_ptr + _offsets(pixel, height, width, y_f, y_h, y_w)[:, None] + channel[None, :], mask=mask, other=0.0)
    total = x.to(tl.float32) + y.to(tl.float32)
    if has_bias:
        total += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + _offsets(pixel, height, width, out_f, out_h, out_w)[:, None] + channel[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def interleave_kernel(
    out_ptr, x_ptr, bias_ptr,
    out_f, out_h, out_w, x_f, x_h, x_w,
    num_pixels, height, width,
    channels: tl.constexpr, has_bias: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * block_p + tl.arange(0, block_p)
    channel = tl.arange(0, block_c)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    frame = pixel // (height * width)
    row = pixel // width % height
    column = pixel % width
    # An odd row comes from the window one further down; rows before columns number the phases, each with its channels.
    source = frame.to(tl.int64) * x_f + (row // 2 + row % 2) * x_h + (column // 2 + column % 2) * x_w
    source += (row % 2 * 2 + column % 2) * channels
    value = tl.load(x_ptr + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        value += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + _offsets(pixel, height, width, out_f, out_h, out_w)[:, None] + channel[None, :]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask)
