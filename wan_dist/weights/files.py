"""Checkpoint files as one table of tensors: names and shapes known at once, values read one at a time."""

import ctypes
import json
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan_dist.errors import InputError, first_line

Shape = tuple[int, ...]

_LIBC = ctypes.CDLL(None)


class TensorFiles:
    """The tensors of one or several ``.safetensors`` or ``.pth`` files.

    Opening reads headers only and checks that each file is whole; raises InputError with the file's name if one is not.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.bytes_read = 0
        self.shapes: dict[str, Shape] = {}
        self._fp8: set[str] = set()
        self._readers: dict[str, Any] = {}
        for path in self.paths:
            reader, shapes, fp8 = _open_safetensors(path) if path.suffix == ".safetensors" else (*_open_pickle(path), set())
            self.shapes |= shapes
            self._fp8 |= fp8
            self._readers |= dict.fromkeys(shapes, reader)

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the file's dtype, on the CPU; pages are read from disk as they are touched."""
        reader = self._readers[name]
        return self._counted(reader[name] if isinstance(reader, dict) else reader.get_tensor(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor; only their bytes are read."""
        reader = self._readers[name]
        return self._counted(reader[name][start:stop] if isinstance(reader, dict) else reader.get_slice(name)[start:stop])

    def is_fp8(self, name: str) -> bool:
        """Whether the file has this tensor in 8-bit floats (e4m3)."""
        return name in self._fp8

    def scale_of(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return what rows of an 8-bit tensor are to be multiplied with: one number, or one a row (n, 1); None if there is nothing."""
        stem = name.removesuffix("weight")
        for key in (f"{stem}scale_weight", f"{stem}weight_scale"):
            if key in self.shapes and self.shapes[key] != (0,):
                scale = self.read(key).float().reshape(-1, 1)
                return scale if len(scale) == 1 else scale[start:stop]
        return None

    @staticmethod
    def forget(tensor: Tensor) -> None:
        """Let the system have the pages of a tensor that came from here: until then they count as this process's memory."""
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - first
        if length > 0 and tensor.is_contiguous():
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    def _counted(self, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def __str__(self) -> str:
        first = str(self.paths[0])
        return first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more"


def open_sharded(folder: Path, stem: str) -> TensorFiles:
    """Open ``stem.safetensors``, or the shards that ``stem.safetensors.index.json`` lists; raises InputError if one is missing."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise InputError(f"{folder}: {len(missing)} of the {len(shards)} shards in {index.name} are missing: {first_ten(missing)}")
        return TensorFiles([folder / shard for shard in shards])
    paths = sorted(folder.glob(f"{stem}*.safetensors"))
    if not paths:
        raise InputError(f"{folder} holds no {stem}*.safetensors; is the download complete?")
    return TensorFiles(paths)


def first_ten(items: Sequence[str]) -> str:
    """Return the first ten items and how many more there are."""
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + more


def _open_safetensors(path: Path) -> tuple[Any, dict[str, Shape], set[str]]:
    header = _read_header(path)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    fp8 = {name for name, entry in entries.items() if entry["dtype"] == "F8_E4M3"}
    return safe_open(path, framework="pt"), {name: tuple(entry["shape"]) for name, entry in entries.items()}, fp8


def _read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors header; format: 8 bytes of length, then JSON, then the data (huggingface/safetensors, README)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull` or `hf download`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header: dict[str, Any] = json.loads(file.read(length) if 0 < length < size else b"")
        except ValueError:
            raise InputError(f"{path} ({size} bytes) has no readable safetensors header; download it again") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise InputError(f"{path} is truncated: {size} of {expected} bytes; download it again")
    return header


def _open_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Shape]]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is the download complete?") from None
    except Exception as fault:  # torch raises RuntimeError, UnpicklingError, EOFError or ValueError for a damaged file
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; download it again ({first_line(fault)})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} is not a plain dictionary of tensors")
    return tensors, {name: tuple(value.shape) for name, value in tensors.items()}
