"""Tensors in checkpoint files, as one table: names and shapes at once, values one at a time.

Safetensors, PyTorch's own formats and GGUF are read; code in a file is never run. Errors say what to do.
"""

import ctypes
import mmap
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS, decode_rows
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.gguf_header import GGUF_MAGIC
from wan_dist.runtime.text_files import (
    UnreadableFileError,
    check_regular_file,
    read_checkpoint_json,
)
from wan_dist.weights.combined_file import select_model
from wan_dist.weights.device_copy import copy_to_device
from wan_dist.weights.gguf_file import GgufFile
from wan_dist.weights.pickle_file import PickleFile
from wan_dist.weights.quantization import WeightScale, find_quantization
from wan_dist.weights.safetensors_file import SafetensorsFile
from wan_dist.weights.tensor_file import FLOAT_TYPES, TensorFile
from wan_dist.weights.tensor_file import Shape as Shape
from wan_dist.weights.tensor_file import format_first_ten as format_first_ten

_LIBC = ctypes.CDLL(None)
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\3\4", b"\x80"
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_FOREIGN_FORMATS = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the weights; fetch them with `git lfs pull` or `hf download`",
    ),
    (
        rb"\x08[\x01-\x1f][\x12\x1a:]",
        "ONNX, which is not supported; use the same weights in .safetensors",
    ),
    (
        rb"\s*<(?i:!doctype|html|\?xml)",
        "a page of HTML or XML, as a failed download leaves; download it again",
    ),
    (rb"\s*[\[{]", "JSON; give the file of weights, or for several files their folder as ckpt_dir"),
    (rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|BZh|Rar!|.{257}ustar", "packed; unpack it"),
    (
        rb"\x89HDF|\x93NUMPY",
        "of HDF5 or NumPy, which are not supported; use the same weights in .safetensors",
    ),
    (rb"\0{512}", "empty where it should begin: its download was not finished; download it again"),
)
"""Signatures of files that hold no readable weights, what the files are, and what to do."""


class TensorFiles:
    """The tensors of one or several files, whose formats are detected by their content.

    Opening reads headers only, except for files of PyTorch before 1.6, and checks that each file is complete;
    raises InputError with the file's name if one is not, or is quantised in a way that is not read. Of a file
    that holds several models, only the one that ``setting``, such as ``vae_file``, names is opened.
    """

    def __init__(self, paths: Sequence[Path], *, setting: str | None = None) -> None:
        self.paths = tuple(paths)
        self.bytes_read, self._count_lock = 0, threading.Lock()
        self.shapes: dict[str, Shape] = {}
        """Shapes of the weights; other tensors, such as scales of weights, are not included."""
        self.stored_names: tuple[str, ...] = ()
        """Names of all tensors, also of those that are not weights."""
        self.non_float_types: dict[str, str] = {}
        """Tensors that cannot be weights, and their data types."""
        self.metadata: dict[str, object] = {}
        """Metadata of the files."""
        self._type_names: dict[str, str] = {}
        self._readers: dict[str, TensorFile] = {}
        self._scales: dict[str, WeightScale] = {}
        self._is_mapped = True
        path_by_tensor: dict[str, Path] = {}
        for path in self.paths:
            reader = _open_tensor_file(path)
            if setting is not None:
                reader = select_model(reader, path, setting)
            if duplicate := next((name for name in reader.shapes if name in path_by_tensor), None):
                raise InputError(
                    f"{path_by_tensor[duplicate]} and {path.name} both have {duplicate}; "
                    "remove the file that is not of this checkpoint"
                )
            path_by_tensor |= dict.fromkeys(reader.shapes, path)
            self.shapes |= reader.shapes
            self.metadata |= reader.metadata
            self._type_names |= reader.type_names
            self._readers |= dict.fromkeys(reader.shapes, reader)
            self._is_mapped &= reader.is_mapped
        self.stored_names = tuple(self.shapes)
        self._find_quantization()

    def _find_quantization(self) -> None:
        try:
            quantization = find_quantization(
                self.shapes, self._type_names, self.metadata, self.peek
            )
        except InputError as error:
            raise InputError(f"{self}: {error}") from None
        self._scales = dict(quantization.scales)
        for key in quantization.extra_keys:
            del self.shapes[key]
        self.non_float_types = {
            name: type_name
            for name in self.shapes
            if (type_name := self._type_names[name]) not in FLOAT_TYPES
            and not self.is_encoded(name)
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored, on the CPU; pages are read from disk on first access."""
        return self._count_bytes_read(self.peek(name))

    def peek(self, name: str) -> Tensor:
        """Return one tensor of which few values will be inspected; ``bytes_read`` does not count it."""
        return self._readers[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor as they are stored, from ``start`` to before ``stop``.

        Only their bytes are read. Rows of GGUF's blocks are bytes, (n, bytes of a row).
        """
        return self._count_bytes_read(self._readers[name].read_rows(name, start, stop))

    def read_values(self, name: str, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the values of rows of one tensor, from ``start`` to before ``stop``, on ``device``.

        They are float32 where `is_encoded`, and computed on ``device``, else of the file's dtype. Raises
        InputError for scales that are not finite.
        """
        stored_rows = self.read_rows(name, start, stop)
        rows = copy_to_device(stored_rows, device)
        if (block_format := BLOCK_FORMATS.get(self._type_names[name])) is not None:
            values = decode_rows(rows, block_format).view(len(rows), *self.shapes[name][1:])
        elif (scale := self.read_scale(name, start, stop)) is not None:
            values = self._scales[name].decode_rows(rows, scale.to(device))
        else:
            values = rows
        if values is not stored_rows:
            self.release_pages(stored_rows)
        return values

    def is_encoded(self, name: str) -> bool:
        """Whether values are computed from what is stored: 8-bit numbers with scales, or GGUF's blocks."""
        return name in self._scales or self._type_names[name] in BLOCK_FORMATS

    def is_fp8(self, name: str) -> bool:
        """Whether the file stores this tensor in 8-bit floats (e4m3)."""
        return self._type_names[name] == "F8_E4M3"

    def describe_encodings(self) -> str:
        """Return what values depend on beside the stored tensors; empty for most files."""
        encodings = {
            name: (scale.rotation_size, self._type_names[name])
            for name, scale in self._scales.items()
            if scale.rotation_size
        } | {
            name: (self.shapes[name], type_name)
            for name, type_name in self._type_names.items()
            if type_name in BLOCK_FORMATS
        }
        return repr(sorted(encodings.items())) if encodings else ""

    def get_type_name(self, name: str) -> str:
        """Return a tensor's data type by its name in safetensors, of GGUF's blocks in llama.cpp."""
        return self._type_names[name]

    def read_scale(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return the factors of rows of an 8-bit tensor, float32; None without scales.

        They are (1, 1), (n, 1) or, of tiles, (n, k).
        """
        if (weight_scale := self._scales.get(name)) is None:
            return None
        scale = self.read(weight_scale.key).float()
        if not scale.isfinite().all():
            raise InputError(f"{self}: {weight_scale.key} is not finite; download it again")
        return weight_scale.select_rows(scale, start, stop)

    def release_pages(self, tensor: Tensor) -> None:
        """Return a stored tensor's pages to the system: until then they count as the process's memory."""
        if not self._is_mapped or tensor.device.type != "cpu":
            return  # there is no file behind them
        start_address = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = tensor.data_ptr() + tensor.nbytes - start_address
        if num_bytes > 0 and tensor.is_contiguous():
            _LIBC.madvise(
                ctypes.c_void_p(start_address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED
            )

    def _count_bytes_read(self, tensor: Tensor) -> Tensor:
        with self._count_lock:
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
        raise InputError(f"{folder} has no {stem}*.safetensors; is the download complete?")
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


def _read_file_start(path: Path) -> bytes:
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            return file.read(512)
    except UnreadableFileError as error:
        raise InputError(f"{path} cannot be read: {error}; is the download complete?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _open_tensor_file(path: Path) -> TensorFile:
    """Open a file of any format; the suffix decides only for unknown signatures."""
    file_start, is_pickle = _read_file_start(path), path.suffix.lower() in _PICKLE_SUFFIXES
    if file_start.startswith(GGUF_MAGIC):
        return GgufFile(path)
    if file_start[8:9] == b"{":
        return SafetensorsFile(path)
    # A bare pickle is PyTorch's format before 1.6, which cannot be memory-mapped.
    is_legacy = file_start.startswith(_PICKLE_MAGIC)
    if file_start.startswith(_ZIP_MAGIC) or is_legacy:
        return PickleFile(path, is_legacy=is_legacy)
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
    return PickleFile(path, is_legacy=is_legacy) if is_pickle else SafetensorsFile(path)
