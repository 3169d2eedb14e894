"""Atomic file writes: a temporary file in the same folder is written, synced to disk, and renamed.

A file has its final name only when it is complete and on the disk.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYNC_UNSUPPORTED_ERRNOS = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EISDIR,
)
"""Errors of file systems that cannot sync a file or folder at all; EIO and ENOSPC concern the data."""
_PARTIAL_NAME_PATTERN = re.compile(r"\.(.+)\.[0-9a-f]+\.partial(\.[^.]*)?")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes ``path`` at the end, and is deleted after an error.

    The temporary file is hidden, has the suffix of ``path``, and is used by no other process. The file is
    on the disk before it has its name, and the name before this returns. Raises OSError.
    """
    partial_path = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    # O_EXCL: follows no symbolic link that somebody has put there
    os.close(os.open(partial_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    try:
        yield partial_path
        _sync_path(partial_path)
        partial_path.replace(path)
        _sync_path(path.parent)
    finally:
        partial_path.unlink(missing_ok=True)


def parse_final_name(name: str) -> str | None:
    """Return the final name of a temporary file of `atomic_write`, by its name; None for other names."""
    match = _PARTIAL_NAME_PATTERN.fullmatch(name)
    return f"{match[1]}{match[2] or ''}" if match else None


def quarantine_file(path: Path) -> str:
    """Rename a damaged file, which frees its name and keeps its contents; returns in words what was done."""
    damaged_path = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(damaged_path)
    except OSError as error:
        return f"it is left as it is ({error.strerror})"
    return f"it is kept as {damaged_path.name}"


def _sync_path(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _SYNC_UNSUPPORTED_ERRNOS:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED_ERRNOS:
            raise
    finally:
        os.close(descriptor)
