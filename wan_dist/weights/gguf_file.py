"""Tensors of one GGUF file: the container of llama.cpp, in blocks of few bits.

The header is read here: the `gguf` package needs 13 s and 0.7 GB for a file with umT5's vocabulary, on each
rank. Format: docs/gguf.md of ggml.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_dist.runtime.errors import InputError
from wan_dist.weights.gguf_blocks import BLOCK_FORMATS
from wan_dist.weights.tensor_file import Shape, format_first_ten

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
_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_DIMS = 8
_ARCHITECTURES = (None, "wan", "pig", "cow", "t5", "t5encoder")
"""Values of general.architecture of transformers and text encoders; converters other than llama.cpp's and
ComfyUI-GGUF's write none of their own."""


class GgufFile:
    """A GGUF file; raises InputError for a damaged one, and for types that are not decoded.

    Rows of blocks are returned as bytes, (n, bytes of a row).
    """

    is_mapped = True

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private, so that tensors on it may be written to, which PyTorch demands.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        reader = _HeaderReader(self._data)
        try:
            self.metadata, entries, data_start = reader.read_header()
        except (struct.error, ValueError, IndexError, TypeError) as error:
            raise InputError(
                f"{path} ({len(self._data)} bytes) has no readable GGUF header; "
                f"download it again ({error})"
            ) from None
        self.shapes: dict[str, Shape] = {}
        self.type_names: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for name, shape, type_number, offset in entries:
            self.type_names[name] = _get_type_name(type_number)
            self.shapes[name] = _find_original_shape(name, shape, self.metadata)
            self._offsets[name] = data_start + offset
        self._check(path)

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        return self.read_rows(name, 0, (*self.shapes[name], 1)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor: values, or the bytes of its blocks."""
        shape, offset, row_bytes = (
            self.shapes[name],
            self._offsets[name],
            self._count_row_bytes(name),
        )
        stop = min(stop, (*shape, 1)[0])
        if not row_bytes or start >= stop:
            return torch.empty(max(stop - start, 0), *shape[1:])
        data = torch.frombuffer(
            self._data,
            dtype=torch.uint8,
            count=row_bytes * (stop - start),
            offset=offset + row_bytes * start,
        )
        dtype = _PLAIN_DTYPES.get(self.type_names[name])
        if dtype is None:
            return data.view(stop - start, row_bytes)
        return data.view(dtype).view(stop - start, *shape[1:]) if shape else data.view(dtype)[0]

    def _count_row_bytes(self, name: str) -> int:
        """Return the bytes of a row, whose values are all of the other dims'."""
        num_values, type_name = prod(self.shapes[name][1:]), self.type_names[name]
        if type_name in _PLAIN_DTYPES:
            return num_values * _PLAIN_DTYPES[type_name].itemsize
        block_format = BLOCK_FORMATS[type_name]
        return num_values // block_format.num_values * block_format.num_bytes

    def _check(self, path: Path) -> None:
        """Raise InputError for a foreign architecture, types that are not decoded, and a truncated file."""
        architecture = self.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise InputError(
                f"{path} is of another model: its general.architecture is {architecture}, "
                "not wan or t5encoder"
            )
        known_types = (*_PLAIN_DTYPES, *BLOCK_FORMATS)
        if foreign_types := sorted(set(self.type_names.values()) - set(known_types)):
            raise InputError(
                f"{path} has tensors of {format_first_ten(foreign_types)}, which is not supported; "
                f"use a file of {', '.join(known_types)}"
            )
        for name, type_name in self.type_names.items():
            num_values = prod(self.shapes[name][1:])
            if type_name in BLOCK_FORMATS and (
                not self.shapes[name] or num_values % BLOCK_FORMATS[type_name].num_values
            ):
                raise InputError(
                    f"{path}: rows of {name} {self.shapes[name]} are not "
                    f"a multiple of the block size of {type_name}; download it again"
                )
            if (
                type_name in _PLAIN_DTYPES
                and self._offsets[name] % _PLAIN_DTYPES[type_name].itemsize
            ):
                raise InputError(f"{path}: {name} begins within a number; download it again")
        expected_bytes = max(
            (
                self._offsets[name] + self._count_row_bytes(name) * (*shape, 1)[0]
                for name, shape in self.shapes.items()
            ),
            default=0,
        )
        if len(self._data) < expected_bytes:
            raise InputError(
                f"{path} is truncated: {len(self._data)} of {expected_bytes} bytes; download it again"
            )


def _get_type_name(number: int) -> str:
    return (_TYPE_NAMES | _UNREAD_TYPE_NAMES).get(number, f"type {number}")


def _find_original_shape(name: str, shape: Shape, metadata: dict[str, Any]) -> Shape:
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
    ) -> tuple[dict[str, Any], list[tuple[str, Shape, int, int]], int]:
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
