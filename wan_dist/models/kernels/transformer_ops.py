"""What stands between the transformer's matrix products, one pass over memory each: Triton kernels on a GPU, plain PyTorch elsewhere.

Arithmetic is float32 whatever the dtype. Shapes: B batch, L tokens, D width, H heads, R rows of modulation, one for each segment of
tokens that share a timestep.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.rotary import apply_rotary
from wan_dist.models.kernels.dispatch import (
    compute_block_size,
    load_verified_kernels,
    supports_fp8_matmul,
)

FLOAT32_CHUNK_TOKENS = 4096
"""Tokens at a time in float32 without kernels: longer sequences are cut, so that float32 copies of them stay small."""


FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Tokens(NamedTuple):
    """Tokens as 8-bit floats (..., D) with a scale for each (n, 1), float32: what linears in fp8 multiply."""

    values: Tensor
    scale: Tensor


Out = TypeVar("Out", Tensor, Fp8Tokens, Tensor | Fp8Tokens)


class Scaling(NamedTuple):
    """What follows a LayerNorm: times scale, or 1 + scale, plus shift; each (B, R, 1, D) float32, or with one row for all tokens."""

    scale: Tensor
    shift: Tensor
    plus_one: bool = True


def split_by_segment(segments: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield neighbouring runs of at most `PIECE` tokens, each with the number of the segment in which it lies."""
    end = 0
    for segment_index, length in enumerate(segments):
        start, end = end, end + length
        for piece_start in range(start, end, FLOAT32_CHUNK_TOKENS):
            yield segment_index, slice(piece_start, min(piece_start + FLOAT32_CHUNK_TOKENS, end))


def split_by_length(
    segments: Sequence[int], max_length: int | None
) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield runs of at most ``length`` tokens, all of them for None, each with what lies in it of every segment."""
    num_tokens = sum(segments)
    segment_bounds = list(itertools.accumulate(segments, initial=0))
    for slice_start in range(0, num_tokens, max_length or num_tokens):
        slice_end = min(slice_start + (max_length or num_tokens), num_tokens)
        slice_segments = (
            max(0, min(segment_end, slice_end) - max(segment_start, slice_start))
            for segment_start, segment_end in itertools.pairwise(segment_bounds)
        )
        yield slice(slice_start, slice_end), tuple(slice_segments)


def compute_in_slices(
    token_slices: Sequence[tuple[slice, tuple[int, ...]]],
    x: Tensor,
    compute_slice: Callable[[slice, tuple[int, ...]], Tensor],
) -> Tensor:
    """Return what ``work`` makes of the parts of `slices` of x (B, L, D), (B, l, ...) each, in one tensor (B, L, ...)."""
    first_output = compute_slice(*token_slices[0])
    if len(token_slices) == 1:
        return first_output
    output = first_output.new_empty(first_output.shape[0], x.shape[1], *first_output.shape[2:])
    output[:, token_slices[0][0]] = first_output
    del first_output
    for token_slice, slice_segments in token_slices[1:]:
        output[:, token_slice] = compute_slice(token_slice, slice_segments)
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim in float32 (arXiv:1910.07467); returns float32."""
    return F.rms_norm(x.float(), weight.shape, weight, eps)


def scale_rows(rows: Tensor, row_max: float) -> tuple[Tensor, Tensor]:
    """Return rows (..., k) divided so that the largest value of each is ``most``, float32, and by what, (n, 1) float32."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / row_max
    return rows.float() * (1 / scale), scale.flatten(0, -2)


def make_output_buffer(x: Tensor, *, as_fp8: bool) -> Tensor | Fp8Tokens:
    """Return room for tokens like x (B, L, D)."""
    if as_fp8:
        return Fp8Tokens(
            x.new_empty(x.shape, dtype=FP8),
            x.new_empty(x.shape[:-1].numel(), 1, dtype=torch.float32),
        )
    return x.new_empty(x.shape)


def layer_norm(x: Tensor, scaling: Scaling, segments: tuple[int, ...], eps: float, out: Out) -> Out:
    """LayerNorm of x (B, L, D), then `Scaling`, as in DiT's adaLN (arXiv:2212.09748); returns ``out``, see `room_for`."""
    _run_layer_norm(_select_kernels(x, segments), x, scaling, segments, eps, out)
    return out


def add_gated_(x: Tensor, y: Tensor, gate: Tensor | None, segments: tuple[int, ...]) -> None:
    """Add gate * y, or y, to x in place; x and y (B, L, D), gate (B, R, 1, D) float32."""
    _run_add_gated_(_select_kernels(x, segments), x, y, gate, segments)


def add_gated_layer_norm_(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scaling: Scaling,
    segments: tuple[int, ...],
    eps: float,
    out: Out,
) -> Out:
    """Do `add_`, then return `layer_norm` of x, in ``out``; in one pass on a GPU."""
    _run_add_gated_layer_norm_(
        _select_kernels(x, segments), x, y, gate, scaling, segments, eps, out
    )
    return out


def norm_and_rotate(
    x: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, out: Tensor
) -> None:
    """RMSNorm of x (B, L, H, D / H) over the whole width, then its rotary embedding if there is one, into ``out``, which may be x.

    ``out`` may have its heads in N parts that lie apart: (B, L, N, H / N, D / H).
    """
    _run_norm_and_rotate(_select_kernels(x.flatten(2), (x.shape[1],)), x, weight, eps, rotary, out)


def apply_linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """Return GELU of ``linear(x)`` by its tanh approximation (arXiv:1606.08415); on a GPU in the same pass where the linear is plain."""
    if x.is_cuda and x.dtype != torch.float32 and isinstance(linear, nn.Linear):
        out = torch._addmm_activation(
            linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True
        )
        return out.unflatten(0, x.shape[:-1])
    return gelu_(linear(x))


def gelu_(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, in place: x is the largest array of a step."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


@cache
def _load_kernels(device: torch.device, width: int) -> ModuleType | None:
    """Return the kernels if they do right at this width, in each way that they are used."""
    x = torch.linspace(-1, 2, 3 * width, device=device).view(1, 3, width)
    scale, shift = torch.linspace(-2, 2, 4 * width, device=device).view(2, 1, 2, 1, width)
    head_dim = math.gcd(width, 128)
    angles = torch.linspace(0, 3, 3 * head_dim // 2, device=device).view(3, 1, -1)

    def run_trial(kernels: ModuleType | None) -> Tensor:
        tokens, addend, normed, segments = (
            x.bfloat16(),
            x.flip(1).bfloat16(),
            torch.empty_like(x),
            (1, 2),
        )
        affine, adaptive, fp8_or_half = (
            torch.empty_like(tokens),
            torch.empty_like(tokens),
            make_output_buffer(tokens, as_fp8=supports_fp8_matmul(device)),
        )
        _run_layer_norm(kernels, tokens, Scaling(scale, shift), segments, 1e-6, normed)
        _run_layer_norm(kernels, tokens, Scaling(scale, shift), segments, 1e-6, fp8_or_half)
        _run_add_gated_layer_norm_(
            kernels,
            tokens,
            addend,
            shift,
            Scaling(scale[:, :1], shift[:, :1], plus_one=False),
            segments,
            1e-6,
            affine,
        )
        _run_add_gated_layer_norm_(
            kernels, tokens, affine, None, Scaling(scale, shift), segments, 1e-6, adaptive
        )
        _run_add_gated_(kernels, tokens, adaptive, scale, segments)
        heads = adaptive.unflatten(2, (-1, head_dim))
        _run_norm_and_rotate(kernels, heads, x[0, 0], 1e-6, (angles.cos(), angles.sin()), heads)
        _run_norm_and_rotate(kernels, heads, x[0, 1], 1e-6, None, heads)
        dequantized = (
            fp8_or_half.values.float() * fp8_or_half.scale
            if isinstance(fp8_or_half, Fp8Tokens)
            else fp8_or_half.float()
        )
        return torch.cat([normed, affine.float(), tokens.float(), adaptive.float(), dequantized])

    return load_verified_kernels("transformer_kernels", run_trial)


def compile_kernels(device: torch.device, width: int) -> None:
    """Compile and try the kernels for this width now, so that the first step need not."""
    _load_kernels(device, width)


def _select_kernels(x: Tensor, segments: tuple[int, ...]) -> ModuleType | None:
    """Return the kernels if they can take x (B, L, D): on a GPU, in half precision, one video, with two segments at most."""
    if (
        x.is_cuda
        and x.dtype != torch.float32
        and x.shape[0] == 1
        and x.stride(2) == 1
        and len(segments) <= 2
    ):
        return _load_kernels(x.device, x.shape[2])
    return None


def _run_layer_norm(
    kernels: ModuleType | None, x: Tensor, scaling: Scaling, segments: tuple[int, ...], eps: float, out: Tensor | Fp8Tokens
) -> None:  # fmt: skip
    if kernels is not None:
        _launch_add_norm(kernels, x, None, None, scaling, segments, out, eps)
        return
    for row, piece in split_by_segment(segments):
        scale, shift = _select_row(scaling.scale, row), _select_row(scaling.shift, row)
        if scaling.plus_one:
            normed = torch.addcmul(
                shift, F.layer_norm(x[:, piece].float(), x.shape[-1:], eps=eps), 1 + scale
            )
        else:
            normed = F.layer_norm(
                x[:, piece].float(), x.shape[-1:], scale.flatten(), shift.flatten(), eps
            )
        if isinstance(out, Fp8Tokens):
            out.values[:, piece], part_scale = scale_rows(normed, FP8_MAX)
            out.scale.view(*x.shape[:2], 1)[:, piece] = part_scale.view(*normed.shape[:2], 1)
        else:
            out[:, piece] = normed
        del normed


def _run_add_gated_(
    kernels: ModuleType | None, x: Tensor, y: Tensor, gate: Tensor | None, segments: tuple[int, ...]
) -> None:
    if kernels is not None:
        _launch_add_norm(kernels, x, y, gate, None, segments)
    elif gate is None:
        x += y
    else:
        for row, piece in split_by_segment(segments):
            x[:, piece] = torch.addcmul(
                x[:, piece].float(), y[:, piece].float(), _select_row(gate, row)
            )


def _run_add_gated_layer_norm_(
    kernels: ModuleType | None, x: Tensor, y: Tensor, gate: Tensor | None, scaling: Scaling, segments: tuple[int, ...], eps: float,
    out: Tensor | Fp8Tokens,
) -> None:  # fmt: skip
    if kernels is not None:
        _launch_add_norm(kernels, x, y, gate, scaling, segments, out, eps)
    else:
        _run_add_gated_(None, x, y, gate, segments)
        _run_layer_norm(None, x, scaling, segments, eps, out)


def _run_norm_and_rotate(
    kernels: ModuleType | None, x: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, out: Tensor
) -> None:  # fmt: skip
    if kernels is not None:
        width = x.shape[2] * x.shape[3]
        cos, sin = rotary or (weight, weight)
        kernels.norm_rotate_kernel[(x.shape[1],)](
            x, out, weight, cos, sin, x.stride(1), out.stride(1), out.stride(2) if out.dim() == 5 else 0, eps,
            width=width, part=width // out.shape[2] if out.dim() == 5 else width, pairs=x.shape[3] // 2, has_rotary=rotary is not None,
            block=compute_block_size(width), num_warps=8,
        )  # fmt: skip
        return
    for _, piece in split_by_segment(x.shape[1:2]):
        normed = rms_norm(x[:, piece].flatten(2), weight, eps).view_as(x[:, piece])
        if rotary is not None:
            normed = apply_rotary(normed, (rotary[0][piece], rotary[1][piece]))
        out[:, piece] = normed.view(out[:, piece].shape)


def _launch_add_norm(
    kernels: ModuleType, x: Tensor, y: Tensor | None, gate: Tensor | None, scaling: Scaling | None, segments: tuple[int, ...],
    out: Tensor | Fp8Tokens | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """Start the kernel on the tokens of x; x stands in for what there is not."""
    output, output_scale = (
        (out.values, out.scale) if isinstance(out, Fp8Tokens) else (x if out is None else out, x)
    )
    scale, shift, plus_one = scaling or (x, x, False)
    kernels.add_norm_kernel[(x.shape[1],)](
        x, x if y is None else y, x if gate is None else gate, scale, shift, output, output_scale,
        x.stride(1), 0 if y is None else y.stride(1), _get_row_stride(gate), _get_row_stride(None if scaling is None else scale),
        segments[0] if len(segments) > 1 else x.shape[1], eps, FP8_MAX,
        width=x.shape[2], has_y=y is not None, has_gate=gate is not None, has_norm=scaling is not None, plus_one=plus_one,
        is_rounded=isinstance(out, Fp8Tokens), block=compute_block_size(x.shape[2]), num_warps=8,
    )  # fmt: skip


def _select_row(rows: Tensor, row_index: int) -> Tensor:
    return rows[:, row_index if rows.shape[1] > 1 else 0]


def _get_row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None or rows.shape[1] == 1 else rows.stride(1)
