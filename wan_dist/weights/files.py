"""Tensors in checkpoint files, as one table: names and shapes at once, values one at a time.

Safetensors and PyTorch's own formats are read; code in a file is never run. Errors say what to do.
"""

import ctypes
import json
import math
import mmap
import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.text_files import (
    UnreadableFileError,
    check_regular_file,
    read_checkpoint_json,
)

Shape = tuple[int, ...]

_LIBC = ctypes.CDLL(None)
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\3\4", b"\x80"
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs store a model's tensors, beside optimizer states and the like."""
_FOREIGN_FORMATS = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the weights; fetch them with `git lfs pull` or `hf download`",
    ),
    (rb"GGUF", "GGUF, which is not read; take the same weights in .safetensors"),
    (
        rb"\x08[\x01-\x1f][\x12\x1a:]",
        "ONNX, which is not read; take the same weights in .safetensors",
    ),
    (
        rb"\s*<(?i:!doctype|html|\?xml)",
        "a page of HTML or XML, as a failed download leaves; download it again",
    ),
    (rb"\s*[\[{]", "JSON; give the file of weights, or for several files their folder as ckpt_dir"),
    (rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|BZh|Rar!|.{257}ustar", "packed; unpack it"),
    (
        rb"\x89HDF|\x93NUMPY",
        "of HDF5 or NumPy, which are not read; take the same weights in .safetensors",
    ),
    (rb"\0{512}", "empty where it should begin: its download was not finished; download it again"),
)
"""Signatures of files that hold no readable weights, what the files are, and what to do."""


class TensorFiles:
    """The tensors of one or several files in safetensors or PyTorch's format, told apart by their content.

    Opening reads headers only, except for files of PyTorch before 1.6, and checks that each file is complete;
    raises InputError with the file's name if one is not.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.bytes_read = 0
        self.shapes: dict[str, Shape] = {}
        self.non_float_types: dict[str, str] = {}
        """Tensors that cannot be weights, and their data types."""
        self._type_names: dict[str, str] = {}
        self._readers: dict[str, Any] = {}
        self._is_mapped = not any(map(_is_legacy_pickle, self.paths))
        path_by_tensor: dict[str, Path] = {}
        for path in self.paths:
            reader, shapes, type_names = _open_tensor_file(path)
            if duplicate := next((name for name in shapes if name in path_by_tensor), None):
                raise InputError(
                    f"{path_by_tensor[duplicate]} and {path.name} both hold {duplicate}; "
                    "remove the file that is not of this checkpoint"
                )
            path_by_tensor |= dict.fromkeys(shapes, path)
            self.shapes |= shapes
            self.non_float_types |= {
                name: type_name
                for name, type_name in type_names.items()
                if type_name not in _FLOAT_TYPES
            }
            self._type_names |= type_names
            self._readers |= dict.fromkeys(shapes, reader)
        self._check_scales()

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the file's dtype, on the CPU; pages are read from disk on first access."""
        return self._count_bytes_read(self.peek(name))

    def peek(self, name: str) -> Tensor:
        """Return one tensor of which few values will be inspected; ``bytes_read`` does not count it."""
        reader = self._readers[name]
        return reader[name] if isinstance(reader, dict) else reader.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor, from ``start`` to before ``stop``; only their bytes are read."""
        reader = self._readers[name]
        tensor = reader[name] if isinstance(reader, dict) else reader.get_slice(name)
        return self._count_bytes_read(tensor[start:stop])

    def is_fp8(self, name: str) -> bool:
        """Whether the file stores this tensor in 8-bit floats (e4m3)."""
        return self._type_names[name] == "F8_E4M3"

    def read_scale(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return the factors that scale rows of an 8-bit tensor, (1, 1) or (n, 1); None without scales."""
        if (key := self._find_scale_key(name)) is None:
            return None
        scale = self.read(key).float().reshape(-1, 1)
        return scale if len(scale) == 1 else scale[start:stop]

    def _find_scale_key(self, name: str) -> str | None:
        if self._type_names[name] not in ("F8_E4M3", "F8_E5M2"):
            return None
        stem = name.removesuffix("weight")
        candidates = (f"{stem}scale_weight", f"{stem}weight_scale")
        return next((key for key in candidates if self.shapes.get(key, (0,)) != (0,)), None)

    def _check_scales(self) -> None:
        """Raise InputError for scales that are neither one for the tensor nor one for each row."""
        for name, shape in self.shapes.items():
            if (key := self._find_scale_key(name)) is None:
                continue
            if math.prod(self.shapes[key]) not in (1, *shape[:1]):
                raise InputError(
                    f"{self}: {key} has shape {self.shapes[key]}; "
                    f"scales of a tensor of {shape} are one, or one a row"
                )

    def release_pages(self, tensor: Tensor) -> None:
        """Return a tensor's pages to the system: until then they count as this process's memory."""
        if not self._is_mapped:
            return  # there is no file behind them
        start_address = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = tensor.data_ptr() + tensor.nbytes - start_address
        if num_bytes > 0 and tensor.is_contiguous():
            _LIBC.madvise(
                ctypes.c_void_p(start_address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED
            )

    def _count_bytes_read(self, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def __str__(self) -> str:
        first_path = str(self.paths[0])
        return (
            first_path if len(self.paths) == 1 else f"{first_path} and {len(self.paths) - 1} more"
        )


def open_sharded_weights(folder: Path, stem: str) -> TensorFiles:
    """Open the weights ``stem`` of a folder, in one file or in shards.

    The shards are those that ``stem.safetensors.index.json`` lists; without it, all ``stem*.safetensors``;
    without these, ``stem.bin`` or another file in PyTorch's format. Raises InputError if one is missing.
    """
    index_path = folder / f"{stem}.safetensors.index.json"
    if index_path.exists():
        shards = _list_shards(index_path)
        missing_shards = [shard for shard in shards if not (folder / shard).exists()]
        if missing_shards:
            raise InputError(
                f"{folder}: {len(missing_shards)} of the {len(shards)} shards "
                f"in {index_path.name} are missing: {format_first_ten(missing_shards)}"
            )
        return TensorFiles([folder / shard for shard in shards])
    paths = sorted(
        path for path in folder.glob(f"{stem}*") if path.suffix.lower() == ".safetensors"
    )
    paths = paths or sorted(
        path for path in folder.glob(f"{stem}.*") if path.suffix.lower() in _PICKLE_SUFFIXES
    )
    if not paths:
        raise InputError(f"{folder} holds no {stem}*.safetensors; is the download complete?")
    return TensorFiles(paths)


def _list_shards(index_path: Path) -> list[str]:
    """Return the file names that an index lists; raises InputError for names outside its folder."""
    weight_map = read_checkpoint_json(index_path).get("weight_map")
    shard_names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shard_names or not all(isinstance(name, str) and name for name in shard_names):
        raise InputError(f"{index_path} has no weight_map from tensors to files; download it again")
    for name in shard_names:
        if Path(name).name != name:
            raise InputError(
                f"{index_path} names {name}, which is outside its folder; download it again"
            )
        if not name.endswith(".safetensors"):
            raise InputError(
                f"{index_path} names {name}, which is no .safetensors file; download it again"
            )
    return sorted(set(shard_names))


def format_first_ten(items: Sequence[str]) -> str:
    """Return the first ten items and how many more there are."""
    remainder = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + remainder


def _read_file_start(path: Path) -> bytes:
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            return file.read(512)
    except UnreadableFileError as error:
        raise InputError(f"{path} cannot be read: {error}; is the download complete?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _open_tensor_file(path: Path) -> tuple[Any, dict[str, Shape], dict[str, str]]:
    """Return a reader of tensors, their shapes and types; the suffix decides only for unknown signatures."""
    file_start, is_pickle = _read_file_start(path), path.suffix.lower() in _PICKLE_SUFFIXES
    if file_start[8:9] == b"{":
        return _open_safetensors(path)
    if file_start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return _open_pickle(path)
    descriptions = (
        description
        for signature, description in _FOREIGN_FORMATS
        if re.match(signature, file_start, re.DOTALL)
    )
    if description := next(descriptions, None):
        problem = (
            "cannot be read as PyTorch weights"
            if is_pickle
            else "has no readable safetensors header"
        )
        raise InputError(f"{path} ({path.stat().st_size} bytes) {problem}: it is {description}")
    return (_open_pickle if is_pickle else _open_safetensors)(path)


def _is_legacy_pickle(path: Path) -> bool:
    """Whether a file is a bare pickle, PyTorch's format before 1.6, which cannot be memory-mapped."""
    file_start = _read_file_start(path)
    return file_start.startswith(_PICKLE_MAGIC) and file_start[8:9] != b"{"


def _open_safetensors(path: Path) -> tuple[Any, dict[str, Shape], dict[str, str]]:
    """Return a reader of tensors, their shapes and types."""
    header = _read_safetensors_header(path)
    try:
        # It checks that the tensors fill the file without gaps.
        reader = safe_open(path, framework="pt")
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        return (
            reader,
            {name: tuple(entry["shape"]) for name, entry in entries},
            {name: entry["dtype"] for name, entry in entries},
        )
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} has no readable safetensors header; download it again ({get_first_line(error)})"
        ) from None


def _read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return a safetensors header; raises InputError for an unreadable one or a truncated file.

    Format: 8 bytes of length, then JSON, then the data (huggingface/safetensors, README).
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        header_bytes = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else 0
        try:
            is_plausible = 0 < header_bytes < min(file_bytes, _MAX_HEADER_BYTES)
            header_text = file.read(header_bytes) if is_plausible else b""
            header: dict[str, Any] = json.loads(header_text, object_pairs_hook=_reject_duplicates)
            tensor_ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
            expected_bytes = 8 + header_bytes + max(tensor_ends, default=0)
        except (
            ValueError,
            RecursionError,
            TypeError,
            AttributeError,
            KeyError,
            IndexError,
        ) as error:
            reason = f" ({error})" if isinstance(error, _DuplicateKeyError) else ""
            raise InputError(
                f"{path} ({file_bytes} bytes) has no readable safetensors header; "
                f"download it again{reason}"
            ) from None
    if file_bytes < expected_bytes:
        raise InputError(
            f"{path} is truncated: {file_bytes} of {expected_bytes} bytes; download it again"
        )
    return header


class _DuplicateKeyError(ValueError):
    pass


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate tensor names: which of the two is meant would be a guess."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise _DuplicateKeyError("a name is given twice")
    return entries


def _open_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Shape], dict[str, str]]:
    """Return tensors, their shapes and types; code that a pickle may hold is not run."""
    try:
        # Opened by descriptor: torch reads every file whose name ends in .safetensors as safetensors.
        with path.open("rb") as file:
            content = torch.load(
                f"/proc/self/fd/{file.fileno()}",
                map_location="cpu",
                weights_only=True,
                mmap=not _is_legacy_pickle(path),
            )
    except (
        Exception
    ) as error:  # for a damaged file RuntimeError, UnpicklingError, EOFError or ValueError
        if isinstance(error, pickle.UnpicklingError) and (
            global_match := re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(error))
        ):
            reason = (
                f"it holds code, {global_match[1]}, which is not run (weights_only); "
                "take the weights as their publisher has them"
            )
        elif "TorchScript" in str(error):
            reason = "it is a program of TorchScript; take the weights as their publisher has them"
        else:
            reason = f"download it again ({get_first_line(error)})"
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; {reason}"
        ) from None
    wrapped_tensors = [
        content[key]
        for key in _WRAPPER_KEYS
        if isinstance(content, dict) and _is_tensor_dict(content.get(key))
    ]
    tensors = wrapped_tensors[0] if len(wrapped_tensors) == 1 else content
    if not _is_tensor_dict(tensors):
        raise InputError(f"{path} is not a plain dictionary of tensors")
    if unsupported_names := [
        name
        for name, value in tensors.items()
        if value.layout != torch.strided or value.device.type != "cpu"
    ]:
        raise InputError(
            f"{path} is not a plain dictionary of tensors: "
            f"{format_first_ten(unsupported_names)} is sparse, or without values"
        )
    type_names = {
        name: _TYPE_NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        for name, value in tensors.items()
    }
    return tensors, {name: tuple(value.shape) for name, value in tensors.items()}, type_names


def _is_tensor_dict(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
