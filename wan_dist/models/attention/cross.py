"""Cross-attention from the video's tokens to text and image tokens, each with a softmax of its own.

The published pipeline attends to the text's padding, whose rows are all the same. Only one padding row
is stored: on a GPU a kernel weights it by the number of padding rows, elsewhere it is repeated.
Shapes: B batch, L tokens, H heads, D width of a head.
"""

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.kernels.dispatch import load_verified_kernels

_COMPATIBLE_BACKENDS = ("fa4", "fa3", "cudnn", "fa2", "flash", "sage", "8bit")
"""Self-attention backends with which the kernel is used: those that are no more exact.

The half-precision ones are as exact as the kernel, the 8-bit ones less.
"""
_SUPPORTED_HEAD_DIMS = (64, 128)
"""Head widths that the kernel supports."""


def cross_attend(
    attention: InnerAttention, q: Tensor, kv: Sequence[Tensor], text_len: int
) -> Tensor:
    """Return attention to the text, plus attention to the images if there are any: (B, L, H, D).

    q (B, L, H, D). kv: k and v (B, n + 1, H, D) of the text's n tokens and of one padding row, which
    stands for all rows up to ``text_len``; then k and v (B, m, H, D) of the images, if there are any.
    """
    kernels = _select_kernels(attention, q)
    return _run_cross_attention(kernels, attention, q, kv, text_len)


def _select_kernels(attention: InnerAttention, q: Tensor) -> ModuleType | None:
    if (
        q.is_cuda
        and q.dtype != torch.float32
        and q.shape[0] == 1
        and q.shape[3] in _SUPPORTED_HEAD_DIMS
        and attention.name in _COMPATIBLE_BACKENDS
    ):
        return _load_kernels(q.device, q.shape[3])
    return None


@cache
def _load_kernels(device: torch.device, head_dim: int) -> ModuleType | None:
    samples = (
        torch.linspace(-3, 3, 7 * 150 * 2 * head_dim, device=device)
        .sin()
        .view(7, 1, 150, 2, head_dim)
        .bfloat16()
    )
    q, text_kv, image_kv = (
        samples[0],
        [tensor[:, :70] for tensor in samples[1:3]],
        list(samples[3:5]),
    )

    def run_trial(kernels: ModuleType | None) -> Tensor:
        text_only = _run_cross_attention(
            kernels, InnerAttention(), q, [part[:, :5] for part in text_kv], 5
        )
        return torch.cat(
            [
                text_only,
                _run_cross_attention(kernels, InnerAttention(), q, [*text_kv, *image_kv], 512),
            ]
        )

    return load_verified_kernels("transformer_kernels", run_trial)


def compile_kernels(device: torch.device, head_dim: int) -> None:
    """Compile and verify the kernel for heads of this width now, rather than in the first step."""
    if head_dim in _SUPPORTED_HEAD_DIMS:
        _load_kernels(device, head_dim)


def _run_cross_attention(
    kernels: ModuleType | None,
    attention: InnerAttention,
    q: Tensor,
    kv: Sequence[Tensor],
    text_len: int,
) -> Tensor:
    num_padding_tokens = text_len - kv[0].shape[1]
    if kernels is None:
        out = attention(
            q,
            *(
                torch.cat([tensor, tensor[:, -1:].expand(-1, num_padding_tokens, -1, -1)], dim=1)
                for tensor in kv[:2]
            ),
        )
        if len(kv) > 2:
            out += attention(q, *kv[2:])
        return out
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _, num_tokens, num_heads, width = q.shape
    text_kv, image_kv = kv[:2], kv[2:] or kv[:2]
    rows = 128
    num_image_tokens = image_kv[0].shape[1] if len(kv) > 2 else 0
    kernels.cross_attend_kernel[(-(-num_tokens // rows), num_heads)](
        q, *text_kv, *image_kv, out,
        q.stride(1), q.stride(2), *_collect_strides(text_kv), *_collect_strides(image_kv),
        num_heads * width, num_tokens, text_kv[0].shape[1], num_image_tokens,
        math.log2(1 + num_padding_tokens), width**-0.5 / math.log(2),
        width=width, rows=rows, keys=64, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def _collect_strides(kv: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the token and head strides of k, then those of v."""
    return tuple(tensor.stride(dim) for tensor in kv for dim in (1, 2))
