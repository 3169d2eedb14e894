"""Tensors of one GGUF file: the container of llama.cpp, in blocks of few bits."""

import mmap
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.gguf_header import BLOCK_SIZES, count_row_bytes, read_gguf_header
from wan_dist.weights.tensor_file import Shape, format_first_ten

_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
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
        header = read_gguf_header(path, self._data)
        self.metadata = header.metadata
        self.shapes: dict[str, Shape] = {}
        self.type_names: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for name, tensor in header.tensors.items():
            self.shapes[name] = tensor.shape
            self.type_names[name] = tensor.type_name
            self._offsets[name] = tensor.offset
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
        return count_row_bytes(num_values, type_name)

    def _check(self, path: Path) -> None:
        """Raise InputError for a foreign architecture, types that are not decoded, and a truncated file."""
        architecture = self.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise InputError(
                f"{path} is of another model: its general.architecture is {architecture}, "
                "not wan or t5encoder"
            )
        known_types = (*_PLAIN_DTYPES, *BLOCK_SIZES)
        if foreign_types := sorted(set(self.type_names.values()) - set(known_types)):
            raise InputError(
                f"{path} has tensors of {format_first_ten(foreign_types)}, which is not supported; "
                f"use a file of {', '.join(known_types)}"
            )
        for name, type_name in self.type_names.items():
            num_values = prod(self.shapes[name][1:])
            if type_name in BLOCK_SIZES and (
                not self.shapes[name] or num_values % BLOCK_SIZES[type_name][0]
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
