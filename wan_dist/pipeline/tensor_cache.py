"""Cache of encoded inputs on disk: tensors by a key, limited in size."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wan_dist.output.video_file import SaveError, save_tensors
from wan_dist.runtime.log import logger

_HEADER_BYTES = 80
"""Bytes of a file besides its values."""
_MAX_FOLDER_SCANS = 64
"""Upper limit of the folder's scans while the cache is filled once."""
_CLOCK_SKEW_NANOSECONDS = 5 * 10**9
"""Nanoseconds by which a file system's clock may be behind."""


class TensorCache:
    """Tensors by key, of what ``identity`` identifies; several ranks and runs may use one folder at once.

    Where files take more than ``limit_bytes``, the least recently used are evicted, but none that was used
    since this process started: a batch embeds all its prompts first, and the first ones should still be there
    for their jobs.
    """

    def __init__(self, folder: Path, identity: str, limit_bytes: int) -> None:
        self.folder, self.identity, self.limit_bytes = folder, identity, limit_bytes
        self._opened_nanoseconds = time.time_ns() - _CLOCK_SKEW_NANOSECONDS
        self._free_bytes = 0
        """Bytes that may be stored before the folder is scanned again."""
        self._is_full = False

    def get_file(self, key: str) -> Path:
        """Return the file of a key, whether it is there or not."""
        digest = hashlib.sha256(json.dumps([self.identity, key]).encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the tensors of a key are cached, which then count as used just now."""
        try:
            os.utime(self.get_file(key))
        except OSError:
            return False
        return True

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key, None if they are not cached."""
        file = self.get_file(key)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError):
            return None  # missing, being deleted, or damaged: it is encoded again
        with contextlib.suppress(OSError):  # another user's cache, which is read-only here
            os.utime(file)  # used just now
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Store the tensors of a key; returns whether they fit and the folder can be written."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values()) + _HEADER_BYTES
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if num_bytes > self._free_bytes:
                self._evict_unused(num_bytes)
            if num_bytes > self._free_bytes:
                return False
            stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_tensors(self.get_file(key), stored)
        except (OSError, SaveError):
            return False
        self._free_bytes -= num_bytes
        return True

    def _evict_unused(self, num_bytes: int) -> None:
        """Delete the least recently used files until so many bytes fit, and a few more, to scan rarely."""
        if self._is_full:
            return
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another run has deleted it
                    if entry.name.endswith(".safetensors"):
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total_bytes = sum(file_bytes for _, file_bytes, _ in files)
        wanted_bytes = max(num_bytes, self.limit_bytes // _MAX_FOLDER_SCANS)
        for used_nanoseconds, file_bytes, path in sorted(files):
            if (
                total_bytes + wanted_bytes <= self.limit_bytes
                or used_nanoseconds >= self._opened_nanoseconds
            ):
                break
            Path(path).unlink(missing_ok=True)
            total_bytes -= file_bytes
        self._free_bytes = min(self.limit_bytes - total_bytes, wanted_bytes)
        self._is_full = self._free_bytes < num_bytes
        if self._is_full:
            logger.warning(
                "cache.size_gib=%.3g is full: what else this run encodes is not cached, "
                "and is encoded again if the run is interrupted; a larger cache.size_gib keeps it",
                self.limit_bytes / 2**30,
            )
