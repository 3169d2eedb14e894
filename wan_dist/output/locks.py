"""What is done in an output folder, and what somebody is at: several runs may share one."""

import fcntl
import hashlib
import json
import os
import re
import struct
import time
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from wan_dist.planning.digests import FORMAT
from wan_dist.runtime.atomic_write import final_name_of, set_aside
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableError, check_file

DONE, FAILED = "done", "failed"
_LOCKS = ".jobs.lock"
_PROBE = "/"
"""No result can have this name."""
_DELAY = 15.0
"""Seconds in which nodes see what one of them has written."""
_RESULT = re.compile(r"(.+?)((\.[0-9a-f]{12}\.state|\.latents)?\.safetensors|\.mp4|\.png|\.json|\.jpg)")


class Ledger:
    """The records of a folder, and a lock for each name in it, which ends with the process that has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._has_warned = False
        self.num_older = 0
        """Records of an earlier format that `outcome` has met: what they say of their digest means nothing here."""

    @cached_property
    def _leftovers(self) -> dict[str, list[Path]]:
        """Return files that were being written when the folder was opened, by the name of the job they are of, looked for once."""
        found = defaultdict(list)
        for file in self.folder.glob(".*.partial*"):
            if (final := final_name_of(file.name)) is not None and (match := _RESULT.fullmatch(final)):
                found[match[1]].append(file)
        return found

    def open(self) -> None:
        """Make the file of locks, if it is new: a lock is of the byte whose place the name says."""
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.folder / _LOCKS, flags, 0o666)

    def lock(self, name: str) -> bool:
        """Return whether this ledger has the name now, and no other one; files that one before it has not finished go then."""
        try:
            self.open()
            self._set(fcntl.F_WRLCK, name)
        except (BlockingIOError, PermissionError) as fault:
            if self._descriptor is not None:
                return False
            return self._go_on_without(fault)
        except OSError as fault:
            return self._go_on_without(fault)
        for leftover in self._leftovers.pop(name, []):
            leftover.unlink(missing_ok=True)
        return True

    def _go_on_without(self, fault: OSError) -> bool:
        if not self._has_warned:
            logger.warning("%s cannot be locked (%s): do not let two runs share it", self.folder, fault.strerror)
        self._has_warned = True
        return True

    def unlock(self, name: str) -> None:
        """Leave it to others."""
        if self._descriptor is not None and not self._has_warned:
            self._set(fcntl.F_UNLCK, name)

    def _set(self, kind: int, name: str) -> None:
        """Set a lock of this open file, not of the process: two ledgers of one process are two, and closing one leaves the other's."""
        flock = struct.pack("hhqqi0q", kind, os.SEEK_SET, _place(name), 1, 0)
        assert self._descriptor is not None
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, flock)

    def lock_probe(self) -> bool:
        """Take a lock that no result needs; whether nobody else had it. Two hosts that both have it do not see each other's locks."""
        return self.lock(_PROBE)

    def unlock_probe(self) -> None:
        """Give it back."""
        self.unlock(_PROBE)

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
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def record(self, name: str) -> dict[str, Any]:
        """Return the record of a name, empty if there is none that can be read; one that is damaged is set aside."""
        file = self.folder / f"{name}.json"
        try:
            if file.exists():
                check_file(file)
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, UnreadableError) as fault:
            logger.warning("%s cannot be read (%s); its job counts as not made", file, getattr(fault, "strerror", fault))
            return {}
        except (ValueError, RecursionError):
            logger.warning("%s is damaged; %s, and its job is made again", file, set_aside(file))
            return {}
        return found if isinstance(found, dict) else {}

    def outcome(self, name: str, digest: str) -> str | None:
        """Return what has become of the job with this name and digest: done, which its files must bear out, failed, or None."""
        record = self.record(name)
        if record.get("status") in (DONE, FAILED) and record.get("format") != FORMAT:
            self.num_older += 1
        if record.get("digest") != digest:
            return None
        if record.get("status") != DONE:
            return FAILED if record.get("status") == FAILED else None
        try:
            check_file(result := self.folder / Path(str(record["file"])).name)
            is_whole = hash_file(result) == record["video_digest"]
            settings = record["config"]["output"]
            has_tensor = not settings["save_tensor"] or (self.folder / f"{name}.safetensors").is_file()
        except (OSError, KeyError, TypeError, ValueError):  # the last for a name with a NUL, and for a pipe
            return None
        return DONE if is_whole and has_tensor else None


def _place(name: str) -> int:
    """Return the byte of a name; names that some file systems take for the same have the same."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:7], "big")
