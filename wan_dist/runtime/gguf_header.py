"""Header of a GGUF file, the container of llama.cpp: metadata, and names, shapes and types of its tensors.

It is read here: the `gguf` package needs 13 s and 0.7 GB for a file with umT5's vocabulary, on each rank.
Format: docs/gguf.md of ggml.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from wan_dist.runtime.errors import InputError

GGUF_MAGIC = b"GGUF"
_SCALAR_FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
"""Of metadata values, by the number of their type."""
_STRING_TYPE, _ARRAY_TYPE = 8, 9
_TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    28: "F64",
    30: "BF16",
}
_UNREAD_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
BLOCK_SIZES = {
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
}
"""Values and bytes of a block, by the names of the types: all in which transformers and text encoders are
published.
"""
_MAX_DIMS = 8


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file."""

    shape: tuple[int, ...]
    """As it was before it was folded for the container's limit of four dims."""
    type_name: str
    """Of llama.cpp."""
    offset: int
    """In the file."""


@dataclass(frozen=True)
class GgufHeader:
    """What a header says."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path, data: mmap.mmap) -> GgufHeader:
    """Return the header of a file, which ``data`` maps; raises InputError if it is damaged."""
    try:
        metadata, entries, data_start = _HeaderReader(data).read_header()
    except (struct.error, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"{path} ({len(data)} bytes) has no readable GGUF header; download it again ({error})"
        ) from None
    return GgufHeader(
        metadata,
        {
            name: GgufTensor(
                _find_original_shape(name, shape, metadata),
                _get_type_name(type_number),
                data_start + offset,
            )
            for name, shape, type_number, offset in entries
        },
    )


def count_row_bytes(num_values: int, type_name: str) -> int:
    """Return the bytes of a row of whole blocks."""
    values_per_block, bytes_per_block = BLOCK_SIZES[type_name]
    return num_values // values_per_block * bytes_per_block


def _get_type_name(number: int) -> str:
    return (_TYPE_NAMES | _UNREAD_TYPE_NAMES).get(number, f"type {number}")


def _find_original_shape(
    name: str, shape: tuple[int, ...], metadata: dict[str, Any]
) -> tuple[int, ...]:
    """Return a tensor's shape before it was folded for the container's limit of four dims.

    ComfyUI-GGUF's converter stores it in the metadata.
    """
    original_shape = metadata.get(f"comfy.gguf.orig_shape.{name}")
    if original_shape is None:
        return shape
    original_shape = tuple(int(size) for size in original_shape)
    return original_shape if prod(original_shape) == prod(shape) else shape


class _HeaderReader:
    """Reads a header from its beginning; raises struct.error or ValueError at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def read_header(
        self,
    ) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
        """Return metadata; of each tensor name, shape, number of its type and offset; the data's start."""
        self._take(4)  # the magic number
        version, num_tensors, num_values = self._read("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3")
        metadata = {}
        for _ in range(num_values):
            key = self._read_string()
            metadata[key] = self._read_value(*self._read("<I"))
        entries = []
        for _ in range(num_tensors):
            name = self._read_string()
            (num_dims,) = self._read("<I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"{num_dims} dims")
            sizes = self._read(f"<{num_dims}Q")
            entries.append((name, tuple(reversed(sizes)), *self._read("<IQ")))
        if len({entry[0] for entry in entries}) < len(entries):
            raise ValueError("a name is given twice")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        return metadata, entries, -(-self._position // alignment) * alignment

    def _take(self, num_bytes: int) -> int:
        """Return the position, and advance it."""
        start, self._position = self._position, self._position + num_bytes
        if self._position > len(self._data):
            raise ValueError("cut off in its header")
        return start

    def _read(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))

    def _read_string(self) -> str:
        (num_bytes,) = self._read("<Q")
        start = self._take(num_bytes)
        return self._data[start : start + num_bytes].decode(errors="replace")

    def _read_value(self, value_type: int) -> Any:
        if value_type == _STRING_TYPE:
            return self._read_string()
        if value_type != _ARRAY_TYPE:
            return self._read(f"<{_SCALAR_FORMATS[value_type]}")[0]
        item_type, num_items = self._read("<IQ")
        if item_type == _STRING_TYPE:
            return [self._read_string() for _ in range(num_items)]
        item_dtype = np.dtype(f"<{_SCALAR_FORMATS[item_type]}")
        start = self._take(num_items * item_dtype.itemsize)
        return np.frombuffer(self._data, item_dtype, num_items, start).copy()
