"""What happens in a run with jobs, for people (a line each) and for machines (a line of JSON each)."""

import errno
import json
import os
import select
import stat
import sys
import time
from pathlib import Path
from typing import Any

from wan_dist.parallel.shared_counters import Counts
from wan_dist.runtime.durations import duration
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import ANNOUNCEMENT, logger

_PATIENCE = 1.0
"""Seconds for a pipe's reader to make room."""


class Events:
    """``target``: the file that lines of JSON are added to, - for standard output, None for none; ``total``: the jobs that are to be made.

    Counts are of all ranks: each tells of its own jobs. Raises InputError for a file that cannot be written at the start; what happens to
    it later, a full disk or a reader that is gone, is logged once and the run goes on.
    """

    def __init__(self, target: str | None, total: int, counts: Counts) -> None:
        self.target, self.total, self.counts = target, total, counts
        self._began = time.monotonic()
        self._pipe: int | None = None
        self._is_torn, self._is_failing = False, False
        if target not in (None, "-"):
            try:
                self._write("")
            except OSError as fault:
                raise InputError(
                    f"output.events={self.target} cannot be written: {fault.strerror}; name another file, or - for the output"
                ) from None

    def tell(self, event: str, **facts: Any) -> None:
        """Write a line of JSON: its time, the event, facts, and how many jobs are done, failed and left."""
        if self.target is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts, **self.standing()}, ensure_ascii=False) + "\n"
        if self.target == "-":
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        try:
            self._write(line)
        except OSError as fault:
            if not self._is_failing:
                logger.warning("output.events=%s cannot be written (%s): some events are missing there", self.target, fault.strerror)
            self._is_failing = True

    def _write(self, line: str) -> None:
        """Add a line to the file, which is created; to a pipe only while somebody reads it: opening it would else wait for ever."""
        path = Path(self.target or "").expanduser()
        if (file := self._pipe) is None:
            try:
                file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            except OSError as fault:
                if not line and fault.errno == errno.ENXIO and path.is_fifo():
                    return  # a reader may come later
                raise
            self._pipe = file if stat.S_ISFIFO(os.fstat(file).st_mode) else None  # closing it would be the end to its reader
        try:
            self._write_all(file, line)
        except BlockingIOError:
            raise
        except OSError:
            self._pipe = None
            raise
        finally:
            if self._pipe is None:
                os.close(file)

    def _write_all(self, file: int, line: str) -> None:
        data = (b"\n" if self._is_torn and line else b"") + line.encode("utf-8", "backslashreplace")
        writable = select.poll()
        writable.register(file, select.POLLOUT)
        while data:
            writable.poll(1000 * _PATIENCE)
            data = data[os.write(file, data) :]
            self._is_torn = bool(data)

    def standing(self) -> dict[str, float | None]:
        """Return jobs done, failed and left, and the seconds that those are likely to take."""
        done, failed, elsewhere = (self.counts[name] for name in ("done", "failed", "elsewhere"))
        left = self.total - done - failed - elsewhere
        each = (time.monotonic() - self._began) / max(1, done + failed)
        return {"done": done, "failed": failed, "left": left, "seconds_left": round(each * left, 1) if done + failed else None}

    def announce(self, text: str) -> None:
        """Log a line about a job, with how many are left."""
        standing = self.standing()
        left = f"{standing['left']} left" + (f", about {duration(standing['seconds_left'] or 0)}" if standing["left"] else "")
        failed = f", {standing['failed']} failed" if standing["failed"] else ""
        logger.log(ANNOUNCEMENT, "job       %s; %d of %d done%s, %s", text, standing["done"], self.total, failed, left)
