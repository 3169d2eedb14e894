"""What cross-attention computes: from the video's many tokens to few of a text and of images, which have softmaxes of their own.

The published pipeline attends to the text's padding, whose rows are all the same. One of them is kept: on a GPU a kernel counts it as
often as it is there, elsewhere it is repeated. Shapes: B batch, L tokens, H heads, D width of a head.
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
"""Attention beside which the kernel is taken: those in half precision, which are as exact as it, and in 8 bits, which are less."""
_SUPPORTED_HEAD_DIMS = (64, 128)
"""Of a head, that the kernel can take."""


def cross_attend(
    attention: InnerAttention, q: Tensor, kv: Sequence[Tensor], text_len: int
) -> Tensor:
    """Return attention to the text, plus attention to the images if there are any: (B, L, H, D).

    q (B, L, H, D); kv: k and v (B, n + 1, H, D) of the text's n tokens and of one row of padding, which stands for all up to
    ``text_len``; then those of the images, (B, m, H, D).
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
    """Compile and try the kernel for heads of this width now, so that the first step need not."""
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
    kernels.cross_attend_kernel[(-(-num_tokens // rows), num_heads)](
        q, *text_kv, *image_kv, out,
        q.stride(1), q.stride(2), *_collect_strides(text_kv), *_collect_strides(image_kv), num_heads * width,
        num_tokens, text_kv[0].shape[1], image_kv[0].shape[1] if len(kv) > 2 else 0,
        math.log2(1 + num_padding_tokens), width**-0.5 / math.log(2),
        width=width, rows=rows, keys=64, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def _collect_strides(kv: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the strides of tokens and heads, of k and of v."""
    return tuple(tensor.stride(dim) for tensor in kv for dim in (1, 2))
