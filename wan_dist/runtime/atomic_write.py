"""Files that appear when they are whole and on the disk: written under another name beside their own, synced, renamed."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)
"""Errors of file systems that cannot sync a file or folder at all; EIO and ENOSPC are of the data."""
_ASIDE = re.compile(r"\.(.+)\.[0-9a-f]+\.partial(\.[^.]*)?")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield where to write what becomes ``path`` at the end, and goes after an error; hidden, with the same suffix, nobody else's.

    The file is on the disk before it has its name, and the name before this returns. Raises OSError.
    """
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))  # through no link that somebody has put there
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def final_name_of(name: str) -> str | None:
    """Return the name that a file which is written aside is to have, None for one that is not."""
    match = _ASIDE.fullmatch(name)
    return f"{match[1]}{match[2] or ''}" if match else None


def set_aside(path: Path) -> str:
    """Rename a file that is damaged, so that it is in nobody's way but still there; returns what was done, in words."""
    damaged = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(damaged)
    except OSError as fault:
        return f"it is left as it is ({fault.strerror})"
    return f"it is kept as {damaged.name}"


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as fault:
        if fault.errno in _NO_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
