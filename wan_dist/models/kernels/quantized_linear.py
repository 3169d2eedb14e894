"""Linears with weights of 8 or 4 bits: plain tensors and their scales, so that they can be sharded and streamed as any others.

fp8 and int8: a scale for each row of the weight, symmetric. int4: a scale and an offset for each `GROUP` values of a row. Products are
computed in the input's dtype, but for fp8 on GPUs that multiply it, where inputs are rounded to fp8 too, each token with a scale.
"""

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.kernels.dispatch import block_of, multiplies_fp8, tried
from wan_dist.models.kernels.transformer_ops import FP8, FP8_MAX, Rounded, divided, gelu_, room_for

_STORED = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}
PARTS = ("weight", "scale", "offset")
"""What takes the place of a linear's weight; an offset is there in int4 only."""
GROUP = 64
_ROWS_AT_ONCE = 1024


class QuantizedLinear(nn.Module):
    """A linear in place of `nn.Linear`, in 8 or 4 bits."""

    def __init__(self, in_dim: int, out_dim: int, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        columns, groups = (in_dim // 2, in_dim // GROUP) if kind == "int4" else (in_dim, 1)
        self.weight = nn.Parameter(torch.empty(out_dim, columns, dtype=_STORED[kind]), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_dim, groups), requires_grad=False)
        if kind == "int4":
            self.offset = nn.Parameter(torch.empty(out_dim, groups), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim, dtype=dtype))

    def forward(self, x: Tensor | Rounded, rows: slice = slice(None), *, gelu: bool = False) -> Tensor:
        """x (..., in) -> (..., out), or those outputs whose rows of the weight these are; ``gelu``: of GELU of x, which may change x."""
        x = self.prepare(x, gelu=gelu)
        if isinstance(x, Tensor):
            return F.linear(x, self.dequantized(x.dtype, rows), self.bias[rows])
        weight, scale_of_weight, bias = self.weight[rows].t(), self.scale[rows].t(), self.bias[rows]
        values = x.values.flatten(0, -2)
        out = torch._scaled_mm(values, weight, x.scale, scale_of_weight, bias, out_dtype=bias.dtype, use_fast_accum=True)
        return out.unflatten(0, x.values.shape[:-1])

    def prepare(self, x: Tensor | Rounded, *, gelu: bool = False) -> Tensor | Rounded:
        """Return x, or GELU of it, as `forward` takes it; once for several calls. May change x."""
        if isinstance(x, Rounded):
            return x
        if self.takes_rounded and x.dtype == torch.bfloat16:
            return _rounded_to_fp8(_kernels(x.device) if x.is_cuda else None, x, gelu=gelu)
        return gelu_(x) if gelu else x

    @property
    def takes_rounded(self) -> bool:
        """Whether it multiplies tokens that are rounded to fp8."""
        return self.kind == "fp8" and self.bias.dtype == torch.bfloat16 and multiplies_fp8(self.weight.device)

    def dequantized(self, dtype: torch.dtype, which: slice = slice(None)) -> Tensor:
        """Return the weight (out, in), or these rows of it, in ``dtype``."""
        in_dim = self.weight.shape[1] * (2 if self.kind == "int4" else 1)
        weight, scale = self.weight[which], self.scale[which]
        out = torch.empty(len(weight), in_dim, dtype=dtype, device=weight.device)
        for first in range(0, len(out), _ROWS_AT_ONCE):  # float32 copies stay small
            rows = slice(first, first + _ROWS_AT_ONCE)
            if self.kind == "int4":
                values = torch.stack([weight[rows] & 15, weight[rows] >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
                out[rows] = torch.addcmul(self.offset[which][rows].unsqueeze(-1), values, scale[rows].unsqueeze(-1)).flatten(1)
            else:
                out[rows] = weight[rows].float() * scale[rows]
        return out


def _rounded_to_fp8(kernels: ModuleType | None, x: Tensor, *, gelu: bool) -> Rounded:
    """Return tokens x (..., k), or GELU of them, rounded."""
    out, tokens = room_for(x, rounded=True), x.flatten(0, -2)
    assert isinstance(out, Rounded)
    if kernels is not None:
        width = tokens.shape[1]
        block = block_of(width)
        kernels.round_kernel[(len(tokens),)](
            tokens, *out, tokens.stride(0), FP8_MAX, width=width, has_gelu=gelu, block=block, num_warps=max(4, block // 1024)
        )
        return out
    values = out.values.flatten(0, -2)
    for first in range(0, len(tokens), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = F.gelu(tokens[part].float(), approximate="tanh") if gelu else tokens[part]
        values[part], out.scale[part] = divided(rows, FP8_MAX)
    return out


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    tokens = torch.linspace(-2, 3, 4 * 96, device=device).view(4, 96).bfloat16()

    def trial(kernels: ModuleType | None) -> Tensor:
        values, scale = _rounded_to_fp8(kernels, tokens.clone(), gelu=True)
        return values.float() * scale

    return tried("transformer_kernels", trial)


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind whose weights have this dtype."""
    return next(kind for kind, stored in _STORED.items() if stored == dtype)


def quantize(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """Return a `QuantizedLinear`'s `PARTS`, in their order, for rows of a weight (n, in)."""
    if kind == "int4":
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = ((high - low) / 15).clamp_min(1e-12)
        values = ((groups - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8).flatten(1)
        return {"weight": values[:, ::2] | values[:, 1::2] << 4, "scale": scale, "offset": low}
    values, scale = divided(weight, FP8_MAX if kind == "fp8" else 127.0)
    return {"weight": values.to(FP8) if kind == "fp8" else values.round().to(torch.int8), "scale": scale}


def quantize_blocks(blocks: nn.ModuleList, kind: str) -> None:
    """Put quantised linears, still empty, in place of those of all blocks but the first and the last, which are the most sensitive."""
    for block in list(blocks)[1:-1]:
        for name, linear in list(_linears(block)):
            owner, _, attribute = name.rpartition(".")
            other = QuantizedLinear(linear.in_features, linear.out_features, kind, linear.weight.dtype)
            setattr(block.get_submodule(owner), attribute, other)


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module
