"""Tensors of one safetensors file."""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.runtime.errors import InputError, get_first_line

_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""


class SafetensorsFile:
    """A safetensors file; raises InputError for an unreadable header or a truncated file."""

    is_mapped = True

    def __init__(self, path: Path) -> None:
        header = _read_header(path)
        try:
            self.metadata: dict[str, Any] = dict(header.pop("__metadata__", None) or {})
            # It checks that the tensors fill the file without gaps.
            self._reader = safe_open(path, framework="pt")
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self.type_names = {name: entry["dtype"] for name, entry in header.items()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} has no readable safetensors header; "
                f"download it again ({get_first_line(error)})"
            ) from None

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored; pages are read from disk on first access."""
        return self._reader.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor; only their bytes are read."""
        return self._reader.get_slice(name)[start:stop]


def _read_header(path: Path) -> dict[str, Any]:
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
