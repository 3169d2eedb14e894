"""Checkpoint files as one table of tensors: names and shapes known at once, values read one at a time."""

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

from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.text_files import UnreadableError, check_file, read_object

Shape = tuple[int, ...]

_LIBC = ctypes.CDLL(None)
_MOST_BYTES_OF_HEADER = 100_000_000
"""As the safetensors library has it."""
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ZIP, _PICKLE = b"PK\3\4", b"\x80"
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs keep a model's tensors, beside what else they keep."""
_FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull` or `hf download`"),
    (rb"GGUF", "GGUF, which is not read; take the same weights in .safetensors"),
    (rb"\x08[\x01-\x1f][\x12\x1a:]", "ONNX, which is not read; take the same weights in .safetensors"),
    (rb"\s*<(?i:!doctype|html|\?xml)", "a page of HTML or XML, as a failed download leaves; download it again"),
    (rb"\s*[\[{]", "JSON; give the file of weights, or for several files their folder as ckpt_dir"),
    (rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|BZh|Rar!|.{257}ustar", "packed; unpack it"),
    (rb"\x89HDF|\x93NUMPY", "of HDF5 or NumPy, which are not read; take the same weights in .safetensors"),
    (rb"\0{512}", "empty where it should begin: its download was not finished; download it again"),
)
"""How files begin that hold no weights for us, what they are, and what to do."""


class TensorFiles:
    """The tensors of one or several files, in safetensors or as PyTorch saves them, told apart by what is in them.

    Opening reads headers only, but for files of PyTorch before 1.6, and checks that each is whole; raises InputError with the file's
    name if one is not.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.bytes_read = 0
        self.shapes: dict[str, Shape] = {}
        self.not_floats: dict[str, str] = {}
        """Tensors that cannot be weights, and the types of their numbers."""
        self._types: dict[str, str] = {}
        self._readers: dict[str, Any] = {}
        self._is_mapped = not any(map(_is_old, self.paths))
        owners: dict[str, Path] = {}
        for path in self.paths:
            reader, shapes, types = _open(path)
            if twice := next((name for name in shapes if name in owners), None):
                raise InputError(f"{owners[twice]} and {path.name} both hold {twice}; remove the file that is not of this checkpoint")
            owners |= dict.fromkeys(shapes, path)
            self.shapes |= shapes
            self.not_floats |= {name: type_ for name, type_ in types.items() if type_ not in _FLOATS}
            self._types |= types
            self._readers |= dict.fromkeys(shapes, reader)
        self._check_scales()

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the file's dtype, on the CPU; pages are read from disk as they are touched."""
        return self._counted(self.peek(name))

    def peek(self, name: str) -> Tensor:
        """Return one tensor to look at a few of its values, which is no reading of weights."""
        reader = self._readers[name]
        return reader[name] if isinstance(reader, dict) else reader.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor; only their bytes are read."""
        reader = self._readers[name]
        return self._counted(reader[name][start:stop] if isinstance(reader, dict) else reader.get_slice(name)[start:stop])

    def is_fp8(self, name: str) -> bool:
        """Whether the file has this tensor in 8-bit floats (e4m3)."""
        return self._types[name] == "F8_E4M3"

    def scale_of(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return what rows of an 8-bit tensor are to be multiplied with: one number, or one a row (n, 1); None if there is nothing."""
        if (key := self._scale_key(name)) is None:
            return None
        scale = self.read(key).float().reshape(-1, 1)
        return scale if len(scale) == 1 else scale[start:stop]

    def _scale_key(self, name: str) -> str | None:
        if self._types[name] not in ("F8_E4M3", "F8_E5M2"):
            return None
        stem = name.removesuffix("weight")
        keys = (f"{stem}scale_weight", f"{stem}weight_scale")
        return next((key for key in keys if self.shapes.get(key, (0,)) != (0,)), None)

    def _check_scales(self) -> None:
        """Raise InputError for scales that are neither one a tensor nor one a row."""
        for name, shape in self.shapes.items():
            if (key := self._scale_key(name)) is not None and math.prod(self.shapes[key]) not in (1, *shape[:1]):
                raise InputError(f"{self}: {key} has shape {self.shapes[key]}; scales of a tensor of {shape} are one, or one a row")

    def forget(self, tensor: Tensor) -> None:
        """Let the system have the pages of a tensor that came from here: until then they count as this process's memory."""
        if not self._is_mapped:
            return  # there is no file behind them
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
    """Open ``stem.safetensors``, or the shards that ``stem.safetensors.index.json`` lists, else ``stem.bin`` or another of PyTorch's.

    Raises InputError if one is missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        shards = _shards(index)
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise InputError(f"{folder}: {len(missing)} of the {len(shards)} shards in {index.name} are missing: {first_ten(missing)}")
        return TensorFiles([folder / shard for shard in shards])
    paths = sorted(path for path in folder.glob(f"{stem}*") if path.suffix.lower() == ".safetensors")
    paths = paths or sorted(path for path in folder.glob(f"{stem}.*") if path.suffix.lower() in _PICKLES)
    if not paths:
        raise InputError(f"{folder} holds no {stem}*.safetensors; is the download complete?")
    return TensorFiles(paths)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists; raises InputError for others than those of its own folder."""
    places = read_object(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names {name}, which is outside its folder; download it again")
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name}, which is no .safetensors file; download it again")
    return sorted(set(names))


def first_ten(items: Sequence[str]) -> str:
    """Return the first ten items and how many more there are."""
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + more


def _begin_of(path: Path) -> bytes:
    try:
        check_file(path)
        with path.open("rb") as file:
            return file.read(512)
    except UnreadableError as fault:
        raise InputError(f"{path} cannot be read: {fault}; is the download complete?") from None
    except OSError as fault:
        raise InputError(f"{path} cannot be read: {fault.strerror}") from None


def _open(path: Path) -> tuple[Any, dict[str, Shape], dict[str, str]]:
    """Return what reads tensors, their shapes and types; the suffix counts only where a file begins as neither kind does."""
    begin, is_pickle = _begin_of(path), path.suffix.lower() in _PICKLES
    if begin[8:9] == b"{":
        return _open_safetensors(path)
    if begin.startswith((_ZIP, _PICKLE)):
        return _open_pickle(path)
    if what := next((what for sign, what in _FOREIGN if re.match(sign, begin, re.DOTALL)), None):
        wanted = "cannot be read as PyTorch weights" if is_pickle else "has no readable safetensors header"
        raise InputError(f"{path} ({path.stat().st_size} bytes) {wanted}: it is {what}")
    return (_open_pickle if is_pickle else _open_safetensors)(path)


def _is_old(path: Path) -> bool:
    """Whether a file is a pickle alone, as PyTorch saved before 1.6: it cannot be mapped into memory."""
    begin = _begin_of(path)
    return begin.startswith(_PICKLE) and begin[8:9] != b"{"


def _open_safetensors(path: Path) -> tuple[Any, dict[str, Shape], dict[str, str]]:
    """Return what reads tensors, their shapes and types."""
    header = _read_header(path)
    try:
        reader = safe_open(path, framework="pt")  # checks that the tensors fill the file one after the other
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        return reader, {name: tuple(entry["shape"]) for name, entry in entries}, {name: entry["dtype"] for name, entry in entries}
    except (SafetensorError, OSError, KeyError, TypeError) as fault:
        raise InputError(f"{path} has no readable safetensors header; download it again ({first_line(fault)})") from None


def _read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors header; format: 8 bytes of length, then JSON, then the data (huggingface/safetensors, README)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            content = file.read(length) if 0 < length < min(size, _MOST_BYTES_OF_HEADER) else b""
            header: dict[str, Any] = json.loads(content, object_pairs_hook=_once)
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError) as fault:
            why = f" ({fault})" if isinstance(fault, _TwiceError) else ""
            raise InputError(f"{path} ({size} bytes) has no readable safetensors header; download it again{why}") from None
    if size < expected:
        raise InputError(f"{path} is truncated: {size} of {expected} bytes; download it again")
    return header


class _TwiceError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse two tensors of a name: which of them is meant would be a guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError("a name is given twice")
    return found


def _open_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Shape], dict[str, str]]:
    """Return tensors, their shapes and types; nothing that a pickle may hold besides is run."""
    try:
        with path.open("rb") as file:  # by its number: torch takes whatever is called .safetensors for that
            content = torch.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=not _is_old(path))
    except Exception as fault:  # torch raises RuntimeError, UnpicklingError, EOFError or ValueError for a damaged file
        if isinstance(fault, pickle.UnpicklingError) and (found := re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(fault))):
            why = f"it holds code, {found[1]}, which is not run (weights_only); take the weights as their publisher has them"
        elif "TorchScript" in str(fault):
            why = "it is a program of TorchScript; take the weights as their publisher has them"
        else:
            why = f"download it again ({first_line(fault)})"
        raise InputError(f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; {why}") from None
    wrapped = [content[key] for key in _WRAPPERS if isinstance(content, dict) and _is_plain(content.get(key))]
    tensors = wrapped[0] if len(wrapped) == 1 else content
    if not _is_plain(tensors):
        raise InputError(f"{path} is not a plain dictionary of tensors")
    if odd := [name for name, value in tensors.items() if value.layout != torch.strided or value.device.type != "cpu"]:
        raise InputError(f"{path} is not a plain dictionary of tensors: {first_ten(odd)} is sparse, or without values")
    types = {name: _TYPES.get(value.dtype, str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()}
    return tensors, {name: tuple(value.shape) for name, value in tensors.items()}, types


def _is_plain(content: object) -> bool:
    return isinstance(content, dict) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
