"""Files that appear when they are whole and on the disk: written under another name beside their own, synced, renamed."""

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
"""Errors of file systems that cannot sync a file or folder at all; EIO and ENOSPC are of the data."""
_PARTIAL_NAME_PATTERN = re.compile(r"\.(.+)\.[0-9a-f]+\.partial(\.[^.]*)?")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield where to write what becomes ``path`` at the end, and goes after an error; hidden, with the same suffix, nobody else's.

    The file is on the disk before it has its name, and the name before this returns. Raises OSError.
    """
    partial_path = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    os.close(
        os.open(partial_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    )  # through no link that somebody has put there
    try:
        yield partial_path
        _sync_path(partial_path)
        partial_path.replace(path)
        _sync_path(path.parent)
    finally:
        partial_path.unlink(missing_ok=True)


def parse_final_name(name: str) -> str | None:
    """Return the name that a file which is written aside is to have, None for one that is not."""
    match = _PARTIAL_NAME_PATTERN.fullmatch(name)
    return f"{match[1]}{match[2] or ''}" if match else None


def quarantine_file(path: Path) -> str:
    """Rename a file that is damaged, so that it is in nobody's way but still there; returns what was done, in words."""
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
