"""Linears whose weights stay in a GGUF file's blocks on the device, and are decoded when they are used.

Blocks lie along the rows of a weight, so that rows can be sharded and streamed as those of any parameter. The
decoded weights are those of decoding while the file is read, bit for bit, and so are the products.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wan_dist.models.fused_block import RowSliceLinear
from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS, decode_rows, decode_weight

PART_NAME = "weight_"
"""Parameters ``weight_0``, ``weight_1``, ... are the parts of a weight, such as those of q, k and v."""
RowDecoder = Callable[[int, int], Tensor]
"""(start, stop) -> these rows of a part, float32."""


@dataclass(frozen=True)
class WeightPart:
    """How a part of a weight is kept: in blocks of a type, or in the run's dtype if the type is None."""

    type_name: str | None
    merge: Callable[[RowDecoder, Tensor], None] | None = None
    """Writes the decoded rows of a part in blocks, with what LoRAs add to them, into a tensor (n, in)."""


class GgufLinear(RowSliceLinear):
    """Replacement of `nn.Linear` whose weight is parts of equally many rows, each kept in its own way.

    Parts in blocks are bytes, (n, bytes of a row), uint8.
    """

    def __init__(self, linear: nn.Linear, parts: Sequence[WeightPart]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = tuple(parts)
        self.dtype = linear.weight.dtype
        num_rows = self.out_features // len(parts)
        for index, part in enumerate(parts):
            shape, dtype = (num_rows, self.in_features), self.dtype
            if part.type_name is not None:
                block_format = BLOCK_FORMATS[part.type_name]
                num_blocks = self.in_features // block_format.num_values
                shape, dtype = (num_rows, num_blocks * block_format.num_bytes), torch.uint8
            stored = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            self.register_parameter(
                f"{PART_NAME}{index}", nn.Parameter(stored, requires_grad=False)
            )
        self.bias = linear.bias
        self._decoded_weight: Tensor | None = None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded weight."""
        return self.out_features * self.in_features * self.dtype.itemsize

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The decoded weight (out, in); it is kept until `free_weight`."""
        if self._decoded_weight is None:
            self._decoded_weight = self._decode()
        return self._decoded_weight

    def free_weight(self) -> None:
        """Delete the decoded weight."""
        self._decoded_weight = None

    def _decode(self) -> Tensor:
        weight = torch.empty(
            self.out_features, self.in_features, dtype=self.dtype, device=self.bias.device
        )
        targets = weight.chunk(len(self.parts))
        for index, (part, target) in enumerate(zip(self.parts, targets, strict=True)):
            stored = getattr(self, f"{PART_NAME}{index}")
            if part.type_name is None:
                target.copy_(stored)
            elif part.merge is None:
                decode_weight(stored, BLOCK_FORMATS[part.type_name], target)
            else:
                part.merge(partial(_decode_range, stored, part.type_name), target)
        return weight


def _decode_range(stored: Tensor, type_name: str, start: int, stop: int) -> Tensor:
    return decode_rows(stored[start:stop], BLOCK_FORMATS[type_name])


def compress_blocks(
    blocks: Mapping[str, nn.Module], parts_by_linear: Mapping[str, Sequence[WeightPart]]
) -> None:
    """Replace linears of transformer blocks by `GgufLinear` without values, given their parts.

    Each is decoded once in a call of its block, for all contexts and slices of tokens, and freed at its end:
    memory holds one decoded block.
    """
    for block_name, block in blocks.items():
        linears = []
        for name, module in list(block.named_modules()):
            if parts := parts_by_linear.get(f"{block_name}.{name}"):
                assert isinstance(module, nn.Linear)
                linear = GgufLinear(module, parts)
                parent_name, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent_name), attribute, linear)
                linears.append(linear)
        block.register_forward_hook(partial(_free_weights, linears), always_call=True)


def _free_weights(linears: Sequence[GgufLinear], *_: object) -> None:
    for linear in linears:
        linear.free_weight()
