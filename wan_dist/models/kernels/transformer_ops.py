"""Fused norm, modulation, rotary, residual and GELU operations of the transformer.

Each is one pass over memory: a Triton kernel on a GPU, plain PyTorch elsewhere. Arithmetic is float32
whatever the dtype. Shapes: B batch, L tokens, D width, H heads, R rows of modulation, one for each segment
of tokens that share a timestep.
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
"""Tokens at a time in float32 without kernels: longer sequences are split to keep float32 copies small."""

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Tokens(NamedTuple):
    """Tokens in fp8 (..., D) with a float32 scale for each (n, 1), as fp8 linears take them."""

    values: Tensor
    scale: Tensor


Out = TypeVar("Out", Tensor, Fp8Tokens, Tensor | Fp8Tokens)


class Scaling(NamedTuple):
    """Scale and shift after a LayerNorm: times scale, or 1 + scale, plus shift.

    Each is (B, R, 1, D) float32, or (B, 1, 1, D) for all tokens.
    """

    scale: Tensor
    shift: Tensor
    plus_one: bool = True


def split_by_segment(segments: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield consecutive runs of at most `FLOAT32_CHUNK_TOKENS` tokens, each with the index of its segment."""
    end = 0
    for segment_index, length in enumerate(segments):
        start, end = end, end + length
        for piece_start in range(start, end, FLOAT32_CHUNK_TOKENS):
            yield segment_index, slice(piece_start, min(piece_start + FLOAT32_CHUNK_TOKENS, end))


def split_by_length(
    segments: Sequence[int], max_length: int | None
) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield runs of at most ``max_length`` tokens, each with its number of tokens of every segment.

    None yields one run of all tokens.
    """
    num_tokens = sum(segments)
    max_length = max_length or max(num_tokens, 1)
    segment_bounds = list(itertools.accumulate(segments, initial=0))
    for slice_start in range(0, num_tokens, max_length):
        slice_end = min(slice_start + max_length, num_tokens)
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
    """Return the results (B, l, ...) of ``compute_slice`` of slices of x (B, L, D) as one tensor (B, L, ...).

    ``token_slices`` come from `split_by_length`.
    """
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
    """Return rows (..., k) divided by scales such that each row's maximum is ``row_max``, and the scales.

    Both are float32; the scales are (n, 1).
    """
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / row_max
    return rows.float() * (1 / scale), scale.flatten(0, -2)


def make_output_buffer(x: Tensor, *, as_fp8: bool) -> Tensor | Fp8Tokens:
    """Return an uninitialised buffer for tokens like x (B, L, D), in fp8 with scales or in x's dtype."""
    if as_fp8:
        return Fp8Tokens(
            x.new_empty(x.shape, dtype=FP8),
            x.new_empty(x.shape[:-1].numel(), 1, dtype=torch.float32),
        )
    return x.new_empty(x.shape)


def layer_norm(x: Tensor, scaling: Scaling, segments: tuple[int, ...], eps: float, out: Out) -> Out:
    """LayerNorm of x (B, L, D), then `Scaling`, as in DiT's adaLN (arXiv:2212.09748).

    Returns ``out``, see `make_output_buffer`.
    """
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
    """Do `add_gated_`, then return `layer_norm` of x in ``out``; in one pass on a GPU."""
    _run_add_gated_layer_norm_(
        _select_kernels(x, segments), x, y, gate, scaling, segments, eps, out
    )
    return out


def norm_and_rotate(
    x: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, out: Tensor
) -> None:
    """RMSNorm of x (B, L, H, D / H) over the whole width, then rotary embedding if given, into ``out``.

    ``out`` may be x, or have its heads in N parts that are not contiguous: (B, L, N, H / N, D / H).
    """
    _run_norm_and_rotate(_select_kernels(x.flatten(2), (x.shape[1],)), x, weight, eps, rotary, out)


def apply_linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """Return GELU of ``linear(x)`` by its tanh approximation (arXiv:1606.08415).

    On a GPU it is fused with the matrix product if ``linear`` is an `nn.Linear` in half precision.
    """
    if x.is_cuda and x.dtype != torch.float32 and isinstance(linear, nn.Linear):
        out = torch._addmm_activation(
            linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True
        )
        return out.unflatten(0, x.shape[:-1])
    return gelu_(linear(x))


def gelu_(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, in place, since x is the largest tensor of a step."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


@cache
def _load_kernels(device: torch.device, width: int) -> ModuleType | None:
    """Return the kernels if they pass a trial at this width of every combination in which they are used."""
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
    """Compile and verify the kernels for this width now, rather than in the first step."""
    _load_kernels(device, width)


def _select_kernels(x: Tensor, segments: tuple[int, ...]) -> ModuleType | None:
    """Return the kernels if they support x (B, L, D).

    They do on a GPU, in half precision, for one video with at most two segments.
    """
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
    kernels: ModuleType | None,
    x: Tensor,
    scaling: Scaling,
    segments: tuple[int, ...],
    eps: float,
    out: Tensor | Fp8Tokens,
) -> None:
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
    kernels: ModuleType | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scaling: Scaling,
    segments: tuple[int, ...],
    eps: float,
    out: Tensor | Fp8Tokens,
) -> None:
    if kernels is not None:
        _launch_add_norm(kernels, x, y, gate, scaling, segments, out, eps)
    else:
        _run_add_gated_(None, x, y, gate, segments)
        _run_layer_norm(None, x, scaling, segments, eps, out)


def _run_norm_and_rotate(
    kernels: ModuleType | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    if kernels is not None:
        width = x.shape[2] * x.shape[3]
        cos, sin = rotary or (weight, weight)
        has_parts = out.dim() == 5
        part_stride = out.stride(2) if has_parts else 0
        part_width = width // out.shape[2] if has_parts else width
        kernels.norm_rotate_kernel[(x.shape[1],)](
            x, out, weight, cos, sin, x.stride(1), out.stride(1), part_stride, eps,
            width=width, part=part_width, pairs=x.shape[3] // 2, has_rotary=rotary is not None,
            block=compute_block_size(width), num_warps=8,
        )  # fmt: skip
        return
    for _, piece in split_by_segment(x.shape[1:2]):
        normed = rms_norm(x[:, piece].flatten(2), weight, eps).view_as(x[:, piece])
        if rotary is not None:
            normed = apply_rotary(normed, (rotary[0][piece], rotary[1][piece]))
        out[:, piece] = normed.view(out[:, piece].shape)


def _launch_add_norm(
    kernels: ModuleType,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scaling: Scaling | None,
    segments: tuple[int, ...],
    out: Tensor | Fp8Tokens | None = None,
    eps: float = 0.0,
) -> None:
    """Launch `add_norm_kernel` on the tokens of x; x is passed in place of tensors that are None."""
    if isinstance(out, Fp8Tokens):
        output, output_scale = out.values, out.scale
    else:
        output, output_scale = x if out is None else out, x
    scale, shift, plus_one = scaling or (x, x, False)
    addend = x if y is None else y
    addend_stride = 0 if y is None else y.stride(1)
    gate_rows = x if gate is None else gate
    scale_stride = 0 if scaling is None else _get_row_stride(scale)
    num_first_tokens = segments[0] if len(segments) > 1 else x.shape[1]
    kernels.add_norm_kernel[(x.shape[1],)](
        x, addend, gate_rows, scale, shift, output, output_scale,
        x.stride(1), addend_stride, _get_row_stride(gate), scale_stride, num_first_tokens, eps, FP8_MAX,
        width=x.shape[2], has_y=y is not None, has_gate=gate is not None, has_norm=scaling is not None,
        plus_one=plus_one, is_rounded=isinstance(out, Fp8Tokens), block=compute_block_size(x.shape[2]),
        num_warps=8,
    )  # fmt: skip


def _select_row(rows: Tensor, row_index: int) -> Tensor:
    return rows[:, row_index if rows.shape[1] > 1 else 0]


def _get_row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None or rows.shape[1] == 1 else rows.stride(1)
