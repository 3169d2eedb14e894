"""What is done in an output folder, and what somebody is at: several runs may share one."""

import fcntl
import glob
import hashlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from wan_dist.log import logger
from wan_dist.record import digest_of

DONE, FAILED = "done", "failed"
_LOCKS = ".jobs.lock"
_DELAY = 15.0
"""Seconds in which nodes see what one of them has written."""


class Ledger:
    """The records of a folder, and a lock for each name in it, which ends with the process that has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _locks(self) -> BinaryIO:
        """One file: a lock is of the byte whose place the name says."""
        return (self.folder / _LOCKS).open("ab")

    def open(self) -> None:
        """Make the file of locks, if it is new."""
        self._locks.flush()

    def lock(self, name: str) -> bool:
        """Return whether this process has the name now, and no other one; files that one before it has not finished go then."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as fault:
            logger.warning("%s cannot be locked (%s): do not let two runs share it", self.folder, fault.strerror)
            return True
        for leftover in self.folder.glob(f".{glob.escape(name)}.*partial*"):
            leftover.unlink(missing_ok=True)
        return True

    def unlock(self, name: str) -> None:
        """Leave it to others."""
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _place(name))

    def is_seen(self) -> bool:
        """Whether this process sees the folder in which another one has opened the ledger; network file systems may take a moment."""
        until = time.monotonic() + _DELAY
        while not (self.folder / _LOCKS).exists():
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True

    def close(self) -> None:
        """Leave all names to others."""
        if "_locks" in vars(self):
            self._locks.close()

    def record(self, name: str) -> dict[str, Any]:
        """Return the record of a name, empty if there is none that can be read."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def outcome(self, name: str, digest: str) -> str | None:
        """Return what has become of the job with this name and digest: done, which its file must bear out, failed, or None."""
        record = self.record(name)
        if record.get("digest") != digest:
            return None
        if record.get("status") != DONE:
            return FAILED if record.get("status") == FAILED else None
        try:
            is_whole = digest_of(self.folder / Path(str(record["file"])).name) == record["video_digest"]
        except (OSError, KeyError):
            return None
        return DONE if is_whole else None


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
