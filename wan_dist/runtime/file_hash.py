"""SHA-256 digests of files."""

import hashlib
from functools import lru_cache
from pathlib import Path


def hash_file(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_unchanged_file(path: Path) -> str:
    """Return `hash_file` of a file, which is read once while its inode, size and time stay the same."""
    status = path.stat()
    return _hash_once(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**15)
def _hash_once(path: Path, *_file_status: int) -> str:
    return hash_file(path)
