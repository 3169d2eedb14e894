"""Result locks of an output folder, which runs may share: results that are done, and that a run makes."""

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

from wan_dist.config.video_formats import RESULT_SUFFIXES
from wan_dist.output.record import DONE, FAILED, VideoRecord
from wan_dist.planning.digests import FORMAT_VERSION
from wan_dist.runtime.atomic_write import parse_final_name, quarantine_file
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

_LOCK_FILE_NAME = ".jobs.lock"
_PROBE_NAME = "/"
"""Name of the probe lock, which no result can have."""
_VISIBILITY_TIMEOUT_SECONDS = 15.0
"""Seconds within which all nodes should see a file that one of them has written."""
_RESULT_FILE_PATTERN = re.compile(
    r"(.+?)((\.[0-9a-f]{12}\.state|\.latents)?\.safetensors|(\.preview)?\.jpg|\.json|"
    rf"{'|'.join(map(re.escape, RESULT_SUFFIXES))})"
)


class ResultLocks:
    """Records of a folder, and a lock for each result name, which ends with the process that holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._has_warned = False
        self.num_older_records = 0
        """Records of an earlier format that `read_outcome` has met; their digests cannot be compared."""

    @cached_property
    def _partial_files(self) -> dict[str, list[Path]]:
        """Files that were being written when they were looked for, once, by the name of their result."""
        files_by_job = defaultdict(list)
        for file in self.folder.glob(".*.partial*"):
            if (result_name := parse_final_name(file.name)) is not None and (
                match := _RESULT_FILE_PATTERN.fullmatch(result_name)
            ):
                files_by_job[match[1]].append(file)
        return files_by_job

    def open(self) -> None:
        """Open or create the lock file: a lock is on the byte whose offset is a hash of the name."""
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.folder / _LOCK_FILE_NAME, flags, 0o666)

    def acquire(self, name: str) -> bool:
        """Lock a name, and return whether no other process or `ResultLocks` holds it.

        Partial files of the result, which a process that has ended left, are removed then. True also where
        the folder cannot be locked at all, after a warning.
        """
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
                "%s cannot be locked (%s): do not use it in two runs at once",
                self.folder,
                error.strerror,
            )
        self._has_warned = True
        return True

    def release(self, name: str) -> None:
        """Unlock a name."""
        if self._descriptor is not None and not self._has_warned:
            self._set_lock(fcntl.F_UNLCK, name)

    def _set_lock(self, lock_type: int, name: str) -> None:
        """Set an open file description lock (F_OFD_SETLK).

        Unlike a lock of the process it excludes two `ResultLocks` in one process, and closing one leaves the
        other's locks in place.
        """
        flock = struct.pack("hhqqi0q", lock_type, os.SEEK_SET, _compute_lock_offset(name), 1, 0)
        assert self._descriptor is not None
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, flock)

    def acquire_probe(self) -> bool:
        """Take a lock that no result needs, and return whether nobody else holds it.

        Two hosts that both hold it do not see each other's locks.
        """
        return self.acquire(_PROBE_NAME)

    def release_probe(self) -> None:
        """Release the probe lock."""
        self.release(_PROBE_NAME)

    def is_visible(self) -> bool:
        """Whether this process sees the lock file that another one has opened.

        Waits for it, as network file systems may take a moment.
        """
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
        while not (self.folder / _LOCK_FILE_NAME).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def close(self) -> None:
        """Release all locks."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read_record(self, name: str) -> VideoRecord:
        """Return the record of a name, without fields if there is none that can be read.

        A damaged one is quarantined.
        """
        file = self.folder / f"{name}.json"
        try:
            if file.exists():
                check_regular_file(file)
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            return VideoRecord()
        except (OSError, UnreadableFileError) as error:
            logger.warning(
                "%s cannot be read (%s); its job is run again",
                file,
                getattr(error, "strerror", error),
            )
            return VideoRecord()
        except (ValueError, RecursionError):
            logger.warning(
                "%s is damaged; %s, and its job is run again", file, quarantine_file(file)
            )
            return VideoRecord()
        return VideoRecord.from_json(content)

    def read_outcome(self, name: str, digest: str) -> str | None:
        """Return the outcome of the job with this name and digest: done, failed, or None.

        It is done only if the result file is there with the recorded hash, and so is the tensor of frames if
        it was to be saved.
        """
        record = self.read_record(name)
        if record.status in (DONE, FAILED) and record.format != FORMAT_VERSION:
            self.num_older_records += 1
        if record.digest != digest:
            return None
        if record.status != DONE:
            return FAILED if record.status == FAILED else None
        if not (record.file and record.video_digest and record.config):
            return None
        try:
            check_regular_file(result_file := self.folder / Path(record.file).name)
            is_whole = hash_file(result_file) == record.video_digest
            output_settings = record.config["output"]
            has_tensor = (
                not output_settings["save_tensor"]
                or (self.folder / f"{name}.safetensors").is_file()
            )
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
        ):  # ValueError: a name with a NUL, or a pipe
            return None
        return DONE if is_whole and has_tensor else None


def _compute_lock_offset(name: str) -> int:
    """Return the byte offset of a name's lock, equal for names that some file system takes for the same."""
    normalized_name = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
    return int.from_bytes(hashlib.sha256(normalized_name.encode()).digest()[:7], "big")
