"""Quantised linears with weights of 8 or 4 bits, stored as plain tensors and scales.

Being plain parameters, they can be sharded and streamed as any others. fp8 and int8: symmetric, with a
scale for each row of the weight. int4: a scale and an offset for each `INT4_GROUP_SIZE` values of a row.
Products are computed in the input's dtype, except for fp8 on GPUs that multiply it, where inputs are
rounded to fp8 too, with a scale for each token.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.kernels.dispatch import (
    compute_block_size,
    load_verified_kernels,
    supports_fp8_matmul,
)
from wan_dist.models.kernels.transformer_ops import (
    FP8,
    FP8_MAX,
    Fp8Tokens,
    gelu_,
    make_output_buffer,
    scale_rows,
)

_STORAGE_DTYPES = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}
QUANTIZED_PARTS = ("weight", "scale", "offset")
"""Parameters that replace a linear's weight; only int4 has an offset."""
INT4_GROUP_SIZE = 64
_QUANTIZE_CHUNK_ROWS = 1024
"""Rows that are converted at once, so that their float32 copies stay small."""


class QuantizedLinear(nn.Module):
    """Replacement of `nn.Linear` whose weight has 8 or 4 bits."""

    def __init__(self, in_dim: int, out_dim: int, quant: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.quant = quant
        num_columns, num_groups = (
            (in_dim // 2, in_dim // INT4_GROUP_SIZE) if quant == "int4" else (in_dim, 1)
        )
        self.weight = nn.Parameter(
            torch.empty(out_dim, num_columns, dtype=_STORAGE_DTYPES[quant]), requires_grad=False
        )
        self.scale = nn.Parameter(torch.empty(out_dim, num_groups), requires_grad=False)
        if quant == "int4":
            self.offset = nn.Parameter(torch.empty(out_dim, num_groups), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim, dtype=dtype))

    def forward(
        self, x: Tensor | Fp8Tokens, rows: slice = slice(None), *, gelu: bool = False
    ) -> Tensor:
        """x (..., in) -> (..., out), or only the outputs of these rows of the weight.

        With ``gelu``, the input is GELU of x, and x may be overwritten.
        """
        x = self.prepare_input(x, gelu=gelu)
        if isinstance(x, Tensor):
            return F.linear(x, self.dequantize_rows(x.dtype, rows), self.bias[rows])
        weight, weight_scale, bias = self.weight[rows].t(), self.scale[rows].t(), self.bias[rows]
        fp8_values = x.values.flatten(0, -2)
        out = torch._scaled_mm(
            fp8_values,
            weight,
            x.scale,
            weight_scale,
            bias,
            out_dtype=bias.dtype,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.values.shape[:-1])

    def prepare_input(self, x: Tensor | Fp8Tokens, *, gelu: bool = False) -> Tensor | Fp8Tokens:
        """Return x, or GELU of it, as `forward` takes it, for several calls of it; may overwrite x."""
        if isinstance(x, Fp8Tokens):
            return x
        if self.accepts_fp8_tokens and x.dtype == torch.bfloat16:
            return _quantize_to_fp8(_load_kernels(x.device) if x.is_cuda else None, x, gelu=gelu)
        return gelu_(x) if gelu else x

    @property
    def accepts_fp8_tokens(self) -> bool:
        """Whether this linear multiplies tokens that are rounded to fp8."""
        return (
            self.quant == "fp8"
            and self.bias.dtype == torch.bfloat16
            and supports_fp8_matmul(self.weight.device)
        )

    def dequantize_rows(self, dtype: torch.dtype, row_range: slice = slice(None)) -> Tensor:
        """Return the weight (out, in), or these rows of it, in ``dtype``."""
        in_dim = self.weight.shape[1] * (2 if self.quant == "int4" else 1)
        weight, scale = self.weight[row_range], self.scale[row_range]
        out = torch.empty(len(weight), in_dim, dtype=dtype, device=weight.device)
        for start in range(0, len(out), _QUANTIZE_CHUNK_ROWS):  # float32 copies stay small
            chunk = slice(start, start + _QUANTIZE_CHUNK_ROWS)
            if self.quant == "int4":
                int4_groups = (
                    torch.stack([weight[chunk] & 15, weight[chunk] >> 4], dim=-1)
                    .flatten(1)
                    .unflatten(1, (-1, INT4_GROUP_SIZE))
                )
                out[chunk] = torch.addcmul(
                    self.offset[row_range][chunk].unsqueeze(-1),
                    int4_groups,
                    scale[chunk].unsqueeze(-1),
                ).flatten(1)
            else:
                out[chunk] = weight[chunk].float() * scale[chunk]
        return out


def _quantize_to_fp8(kernels: ModuleType | None, x: Tensor, *, gelu: bool) -> Fp8Tokens:
    """Return tokens x (..., k), or GELU of them, rounded to fp8."""
    fp8_tokens, tokens = make_output_buffer(x, as_fp8=True), x.flatten(0, -2)
    assert isinstance(fp8_tokens, Fp8Tokens)
    if kernels is not None:
        width = tokens.shape[1]
        block_size = compute_block_size(width)
        kernels.round_kernel[(len(tokens),)](
            tokens,
            *fp8_tokens,
            tokens.stride(0),
            FP8_MAX,
            width=width,
            has_gelu=gelu,
            block=block_size,
            num_warps=max(4, block_size // 1024),
        )
        return fp8_tokens
    fp8_values = fp8_tokens.values.flatten(0, -2)
    for start in range(0, len(tokens), _QUANTIZE_CHUNK_ROWS):
        chunk = slice(start, start + _QUANTIZE_CHUNK_ROWS)
        rows = F.gelu(tokens[chunk].float(), approximate="tanh") if gelu else tokens[chunk]
        fp8_values[chunk], fp8_tokens.scale[chunk] = scale_rows(rows, FP8_MAX)
    return fp8_tokens


@cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    tokens = torch.linspace(-2, 3, 4 * 96, device=device).view(4, 96).bfloat16()

    def run_trial(kernels: ModuleType | None) -> Tensor:
        values, scale = _quantize_to_fp8(kernels, tokens.clone(), gelu=True)
        return values.float() * scale

    return load_verified_kernels("transformer_kernels", run_trial)


def find_quantization(dtype: torch.dtype) -> str:
    """Return the quantisation whose weights have this dtype."""
    return next(quant for quant, storage_dtype in _STORAGE_DTYPES.items() if storage_dtype == dtype)


def quantize_rows(weight: Tensor, quant: str) -> dict[str, Tensor]:
    """Return the `QUANTIZED_PARTS`, in their order, of a `QuantizedLinear` for rows of a weight (n, in)."""
    if quant == "int4":
        groups = weight.float().unflatten(1, (-1, INT4_GROUP_SIZE))
        group_min, group_max = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = ((group_max - group_min) / 15).clamp_min(1e-12)
        values = (
            ((groups - group_min.unsqueeze(-1)) / scale.unsqueeze(-1))
            .round()
            .clamp(0, 15)
            .to(torch.uint8)
            .flatten(1)
        )
        return {
            "weight": values[:, ::2] | values[:, 1::2] << 4,
            "scale": scale,
            "offset": group_min,
        }
    values, scale = scale_rows(weight, FP8_MAX if quant == "fp8" else 127.0)
    return {
        "weight": values.to(FP8) if quant == "fp8" else values.round().to(torch.int8),
        "scale": scale,
    }


def quantize_blocks(blocks: Iterable[nn.Module], quant: str) -> None:
    """Replace the linears of all blocks but the first and the last by quantised ones without values.

    The first and the last block are the most sensitive to rounding.
    """
    for block in list(blocks)[1:-1]:
        for name, linear in list(_iterate_linears(block)):
            parent_name, _, attribute = name.rpartition(".")
            quantized_linear = QuantizedLinear(
                linear.in_features, linear.out_features, quant, linear.weight.dtype
            )
            setattr(block.get_submodule(parent_name), attribute, quantized_linear)


def _iterate_linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of a block by name, but for one that is small and acts on single heads."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("proj_l"):
            yield name, module
