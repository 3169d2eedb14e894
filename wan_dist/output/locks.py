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

from wan_dist.planning.digests import FORMAT_VERSION
from wan_dist.runtime.atomic_write import parse_final_name, quarantine_file
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

DONE, FAILED = "done", "failed"
_LOCK_FILE_NAME = ".jobs.lock"
_PROBE_NAME = "/"
"""No result can have this name."""
_VISIBILITY_TIMEOUT_SECONDS = 15.0
"""Seconds in which nodes see what one of them has written."""
_RESULT_FILE_PATTERN = re.compile(
    r"(.+?)((\.[0-9a-f]{12}\.state|\.latents)?\.safetensors|\.mp4|\.png|\.json|\.jpg)"
)


class ResultLocks:
    """The records of a folder, and a lock for each name in it, which ends with the process that has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._has_warned = False
        self.num_older_records = 0
        """Records of an earlier format that `outcome` has met: what they say of their digest means nothing here."""

    @cached_property
    def _partial_files(self) -> dict[str, list[Path]]:
        """Return files that were being written when the folder was opened, by the name of the job they are of, looked for once."""
        files_by_job = defaultdict(list)
        for file in self.folder.glob(".*.partial*"):
            if (result_name := parse_final_name(file.name)) is not None and (
                match := _RESULT_FILE_PATTERN.fullmatch(result_name)
            ):
                files_by_job[match[1]].append(file)
        return files_by_job

    def open(self) -> None:
        """Make the file of locks, if it is new: a lock is of the byte whose place the name says."""
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.folder / _LOCK_FILE_NAME, flags, 0o666)

    def acquire(self, name: str) -> bool:
        """Return whether this ledger has the name now, and no other one; files that one before it has not finished go then."""
        try:
            self.open()
            self._set_lock(fcntl.F_WRLCK, name)
        except (BlockingIOError, PermissionError) as error:
            if self._descriptor is not None:
                return False
            return self._proceed_without_lock(error)
        except OSError as error:
            return self._proceed_without_lock(error)
        for partial_file in self._partial_files.pop(name, []):
            partial_file.unlink(missing_ok=True)
        return True

    def _proceed_without_lock(self, error: OSError) -> bool:
        if not self._has_warned:
            logger.warning(
                "%s cannot be locked (%s): do not let two runs share it",
                self.folder,
                error.strerror,
            )
        self._has_warned = True
        return True

    def release(self, name: str) -> None:
        """Leave it to others."""
        if self._descriptor is not None and not self._has_warned:
            self._set_lock(fcntl.F_UNLCK, name)

    def _set_lock(self, lock_type: int, name: str) -> None:
        """Set a lock of this open file, not of the process: two ledgers of one process are two, and closing one leaves the other's."""
        flock = struct.pack("hhqqi0q", lock_type, os.SEEK_SET, _compute_lock_offset(name), 1, 0)
        assert self._descriptor is not None
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, flock)

    def acquire_probe(self) -> bool:
        """Take a lock that no result needs; whether nobody else had it. Two hosts that both have it do not see each other's locks."""
        return self.acquire(_PROBE_NAME)

    def release_probe(self) -> None:
        """Give it back."""
        self.release(_PROBE_NAME)

    def is_visible(self) -> bool:
        """Whether this process sees the folder in which another one has opened the ledger; network file systems may take a moment."""
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
        while not (self.folder / _LOCK_FILE_NAME).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def close(self) -> None:
        """Leave all names to others."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read_record(self, name: str) -> dict[str, Any]:
        """Return the record of a name, empty if there is none that can be read; one that is damaged is set aside."""
        file = self.folder / f"{name}.json"
        try:
            if file.exists():
                check_regular_file(file)
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, UnreadableFileError) as error:
            logger.warning(
                "%s cannot be read (%s); its job counts as not made",
                file,
                getattr(error, "strerror", error),
            )
            return {}
        except (ValueError, RecursionError):
            logger.warning(
                "%s is damaged; %s, and its job is made again", file, quarantine_file(file)
            )
            return {}
        return content if isinstance(content, dict) else {}

    def read_outcome(self, name: str, digest: str) -> str | None:
        """Return what has become of the job with this name and digest: done, which its files must bear out, failed, or None."""
        record = self.read_record(name)
        if record.get("status") in (DONE, FAILED) and record.get("format") != FORMAT_VERSION:
            self.num_older_records += 1
        if record.get("digest") != digest:
            return None
        if record.get("status") != DONE:
            return FAILED if record.get("status") == FAILED else None
        try:
            check_regular_file(result_file := self.folder / Path(str(record["file"])).name)
            is_whole = hash_file(result_file) == record["video_digest"]
            output_settings = record["config"]["output"]
            has_tensor = (
                not output_settings["save_tensor"]
                or (self.folder / f"{name}.safetensors").is_file()
            )
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
        ):  # the last for a name with a NUL, and for a pipe
            return None
        return DONE if is_whole and has_tensor else None


def _compute_lock_offset(name: str) -> int:
    """Return the byte of a name; names that some file systems take for the same have the same."""
    normalized_name = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
    return int.from_bytes(hashlib.sha256(normalized_name.encode()).digest()[:7], "big")
