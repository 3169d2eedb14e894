"""GGUF's block formats, decoded in float32 on any device.

A block is a fixed number of consecutive values of a row. Layouts: ggml-common.h and ggml-quants.c of ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_dist.runtime.gguf_header import BLOCK_SIZES

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DECODED_VALUES = 2**23
"""Values that `decode_weight` decodes at once, so that their float32 copies stay small."""


@dataclass(frozen=True)
class BlockFormat:
    """Values and bytes of a block, and its decoder: (n, num_bytes) uint8 -> (n, num_values) float32."""

    num_values: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor]


def decode_rows(rows: Tensor, block_format: BlockFormat) -> Tensor:
    """Return the values (n, k), float32, of rows (n, bytes) of whole blocks, uint8."""
    blocks = rows.reshape(-1, block_format.num_bytes)
    return block_format.decode(blocks).reshape(len(rows), -1)


def decode_weight(rows: Tensor, block_format: BlockFormat, out: Tensor) -> None:
    """Write the values of rows (n, bytes) of whole blocks, uint8, into ``out`` (n, k), in its dtype.

    They are decoded in float32 and rounded once. All that a kernel for one format would replace.
    """
    num_at_once = max(1, DECODED_VALUES // out.shape[1])
    for start in range(0, len(out), num_at_once):
        chunk = slice(start, start + num_at_once)
        out[chunk] = decode_rows(rows[chunk], block_format)


def _read_half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at an offset of each block, (n, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _split_fields(data: Tensor, num_fields: int, *, num_bits: int) -> Tensor:
    """Return the fields of each byte, from the lowest on: (..., k) -> (..., num_fields, k) uint8."""
    shifts = torch.arange(0, num_fields * num_bits, num_bits, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**num_bits - 1)


def _read_nibbles(data: Tensor) -> Tensor:
    """Return 4-bit values, those of the low halves first: (n, k) -> (n, 2k) uint8."""
    return _split_fields(data, 2, num_bits=4).flatten(-2)


def _read_bits(data: Tensor) -> Tensor:
    """Return single bits in order: (n, k) -> (n, 8k) uint8."""
    return _split_fields(data, 8, num_bits=1).transpose(-1, -2).flatten(-2)


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _decode_q4_0(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * (_read_nibbles(blocks[:, 2:]).float() - 8)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * _read_nibbles(blocks[:, 4:]) + _read_half(blocks, 2)


def _read_five_bits(blocks: Tensor, start: int) -> Tensor:
    high_bits = _read_bits(blocks[:, start : start + 4])
    return (_read_nibbles(blocks[:, start + 4 :]) | high_bits << 4).float()


def _decode_q5_0(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * (_read_five_bits(blocks, 2) - 16)


def _decode_q5_1(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * _read_five_bits(blocks, 4) + _read_half(blocks, 2)


def _look_up_iq4(indices: Tensor) -> Tensor:
    values = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=indices.device)
    return values[indices.int()]


def _decode_iq4_nl(blocks: Tensor) -> Tensor:
    return _read_half(blocks, 0) * _look_up_iq4(_read_nibbles(blocks[:, 2:]))


def _decode_iq4_xs(blocks: Tensor) -> Tensor:
    """Eight groups of 32 values; their scales have 4 bits in one place and 2 in another, less 32."""
    low_bits = _split_fields(blocks[:, 4:8], 2, num_bits=4).transpose(-1, -2).flatten(-2)
    high_bits = _split_fields(blocks[:, 2:4], 4, num_bits=2).transpose(-1, -2).flatten(-2)
    scales = _read_half(blocks, 0) * ((low_bits | high_bits << 4).float() - 32)
    values = _look_up_iq4(_read_nibbles(blocks[:, 8:].unflatten(1, (8, 16))))
    return (scales.unsqueeze(-1) * values).flatten(1)


def _read_two_bits(data: Tensor) -> Tensor:
    """Return 2-bit values in their order: 64 bytes are two times 32 bytes of four values each."""
    return _split_fields(data.unflatten(1, (2, 32)), 4, num_bits=2).flatten(1)


def _decode_q2_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 values, each with a scale and a minimum of 4 bits."""
    scales = _read_half(blocks, 80) * (blocks[:, :16] & 15)
    minimums = _read_half(blocks, 82) * (blocks[:, :16] >> 4)
    values = _read_two_bits(blocks[:, 16:80]).unflatten(1, (16, 16))
    return (scales.unsqueeze(-1) * values - minimums.unsqueeze(-1)).flatten(1)


def _decode_q3_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 values of 3 bits, the third in a mask, less 4; scales of 6 bits, less 32."""
    low_bits = _read_nibbles(blocks[:, 96:104])
    high_bits = _split_fields(blocks[:, 104:108], 4, num_bits=2).flatten(1)
    scales = _read_half(blocks, 108) * ((low_bits | high_bits << 4).float() - 32)
    third_bits = _split_fields(blocks[:, :32], 8, num_bits=1).flatten(1)
    values = (_read_two_bits(blocks[:, 32:96]) | third_bits << 2).float() - 4
    return (scales.unsqueeze(-1) * values.unflatten(1, (16, 16))).flatten(1)


def _read_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 minimums of 6 bits that 12 bytes hold."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return scales, minimums


def _decode_scaled_groups(blocks: Tensor, values: Tensor) -> Tensor:
    """Return values of eight groups of 32, each with a scale and a minimum of 6 bits, at bytes 4 to 16."""
    scales, minimums = _read_six_bits(blocks[:, 4:16])
    scaled = (_read_half(blocks, 0) * scales).unsqueeze(-1) * values.unflatten(1, (8, 32))
    return (scaled - (_read_half(blocks, 2) * minimums).unsqueeze(-1)).flatten(1)


def _read_group_nibbles(data: Tensor) -> Tensor:
    """Return 4-bit values in their order: 128 bytes are four times 32 bytes of two values each."""
    return _split_fields(data.unflatten(1, (4, 32)), 2, num_bits=4).flatten(1)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    return _decode_scaled_groups(blocks, _read_group_nibbles(blocks[:, 16:]))


def _decode_q5_k(blocks: Tensor) -> Tensor:
    fifth_bits = _split_fields(blocks[:, 16:48], 8, num_bits=1).flatten(1)
    return _decode_scaled_groups(blocks, _read_group_nibbles(blocks[:, 48:]) | fifth_bits << 4)


def _decode_q6_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 values of 6 bits, less 32, each with a signed scale of 8 bits."""
    low_bits = _split_fields(blocks[:, :128].unflatten(1, (2, 64)), 2, num_bits=4).flatten(1)
    high_bits = _read_two_bits(blocks[:, 128:192])
    scales = _read_half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    values = (low_bits | high_bits << 4).float() - 32
    return (scales.unsqueeze(-1) * values.unflatten(1, (16, 16))).flatten(1)


_DECODERS = {
    "Q8_0": _decode_q8_0,
    "Q5_1": _decode_q5_1,
    "Q5_0": _decode_q5_0,
    "Q4_1": _decode_q4_1,
    "Q4_0": _decode_q4_0,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
    "Q6_K": _decode_q6_k,
    "Q5_K": _decode_q5_k,
    "Q4_K": _decode_q4_k,
    "Q3_K": _decode_q3_k,
    "Q2_K": _decode_q2_k,
}
BLOCK_FORMATS = {name: BlockFormat(*BLOCK_SIZES[name], _DECODERS[name]) for name in BLOCK_SIZES}
"""Formats by their names in llama.cpp."""
