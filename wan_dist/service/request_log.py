"""Request log of a service: accepted requests and deletions, one JSON object a line, only ever appended to.

It is the queue. The front appends a line, and syncs it to the disk before it answers; the ranks read the
lines that are new. What has become of a request is in the files of its video. Imports no torch.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

SERVICE_FOLDER = "service"
"""Folder in the output folder, of the log and of what belongs to it."""
VIDEO_ID_PATTERN = re.compile(r"video_[0-9a-f]{32}")
_OWNER_TIMEOUT_SECONDS = 10.0
"""Seconds that a front waits for one that is just ending."""


@dataclass(frozen=True)
class VideoRequest:
    """An accepted request."""

    id: str
    """Also the file name of its results, without suffix."""
    created_at: float
    """Seconds since the epoch."""
    task: str
    values: dict[str, Any]
    """Settings by key."""
    images: dict[str, str]
    """Names of uploaded images, by setting."""
    size: str
    num_frames: int
    fps: int
    num_steps: int
    """Denoising steps of all clips."""
    idempotency_key: str | None = None
    line: int = 0
    """Line number in the log, from 1."""


class RequestLog:
    """Requests and deletions in the log of an output folder, as far as they were read."""

    def __init__(self, output_folder: Path) -> None:
        self.folder = output_folder / SERVICE_FOLDER
        self.path = self.folder / "requests.jsonl"
        self.requests: dict[str, VideoRequest] = {}
        """By id, in the order in which they were accepted; deleted ones are not among them."""
        self.deleted_ids: set[str] = set()
        self.lines: dict[str, int] = {}
        """Line numbers of all requests by id, also of deleted ones."""
        self._read_lock = threading.Lock()
        self._num_bytes_read, self._num_lines_read = 0, 0

    def read_new(self) -> None:
        """Read the lines that were appended since the last call.

        A line without an end is being written and is left for the next call. The file is opened each time:
        a network file system shows what other hosts have written to one that is opened.
        """
        with self._read_lock:
            try:
                with self.path.open("rb") as file:
                    file.seek(self._num_bytes_read)
                    lines = file.read().splitlines(keepends=True)
            except FileNotFoundError:
                return
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._num_bytes_read += len(line)
                self._num_lines_read += 1
                self._parse_line(line)

    def _parse_line(self, line: bytes) -> None:
        """Take in a line; a damaged one is logged and left out."""
        try:
            entry = json.loads(line)
            if "deleted" in entry:
                self.deleted_ids.add(entry["deleted"])
                self.requests.pop(entry["deleted"], None)
                return
            request = VideoRequest(**entry, line=self._num_lines_read)
            if not VIDEO_ID_PATTERN.fullmatch(request.id):
                raise ValueError(request.id)
        except (ValueError, TypeError) as error:
            logger.warning(
                "%s, line %d is damaged and left out: %s", self.path, self._num_lines_read, error
            )
            return
        self.lines.setdefault(request.id, request.line)
        if request.id not in self.deleted_ids:
            self.requests.setdefault(request.id, request)


class RequestLogWriter(RequestLog):
    """The log of the one front of an output folder, which appends to it."""

    def open(self) -> None:
        """Create or open the log, lock it, and remove a line that was not written whole.

        Raises InputError where another service uses the folder, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o600)
            self._lock()
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)
            _sync_folder(self.folder)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; use another output.dir"
            ) from None
        self.read_new()

    def _lock(self) -> None:
        deadline = time.monotonic() + _OWNER_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"output.dir={self.folder.parent}: another service uses it; "
                        "end that one, or use another output.dir"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): do not start two services on it",
                    self.path,
                    error.strerror,
                )
                return

    def append_request(self, request: VideoRequest) -> None:
        """Append a request; it is on the disk when this returns. Raises OSError."""
        entry = asdict(request)
        del entry["line"]
        self._append(entry)

    def append_deletion(self, video_id: str) -> None:
        """Append that a request is deleted; it is on the disk when this returns. Raises OSError."""
        self._append({"deleted": video_id, "time": round(time.time(), 3)})

    def _append(self, entry: Mapping[str, object]) -> None:
        unwritten_bytes = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while unwritten_bytes:
                unwritten_bytes = unwritten_bytes[os.write(self._descriptor, unwritten_bytes) :]
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # not accepted: no rank must make it
                os.ftruncate(self._descriptor, end)
            raise
        self.read_new()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
