"""Events of a batch run: log lines for people, and lines of JSON for programs."""

import errno
import json
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_dist.parallel.shared_counters import SharedCounters
from wan_dist.runtime.durations import format_duration
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import ANNOUNCEMENT_LEVEL, logger

_PIPE_TIMEOUT_SECONDS = 1.0
"""Seconds to wait for a pipe's reader to take data out of a full pipe."""


class JobEvents:
    """Reports the events of jobs, with the progress of the run.

    ``target`` is the file that lines of JSON are appended to, - for standard output, None for none;
    ``num_jobs`` is the number of jobs to make, None where jobs are added during the run. ``counters`` are of
    all ranks: each reports its own jobs. Raises InputError for a file that cannot be written at the start;
    what happens to it later, a full disk or a reader that is gone, is logged once and the run continues.
    """

    def __init__(self, target: str | None, num_jobs: int | None, counters: SharedCounters) -> None:
        self.target, self.num_jobs, self.counters = target, num_jobs, counters
        self._start_time = time.monotonic()
        self._lock = threading.Lock()
        """Videos are written, and previews reported, in threads of their own."""
        self._pipe_descriptor: int | None = None
        self._has_partial_line, self._has_warned = False, False
        if target not in (None, "-"):
            try:
                self._append_line("")
            except OSError as error:
                raise InputError(
                    f"output.events={self.target} cannot be written: {error.strerror}; "
                    "use another file, or - for standard output"
                ) from None

    def write_event(self, event: str, **fields: Any) -> None:
        """Write a line of JSON: time, event, ``fields``, and the progress (see `compute_progress`)."""
        if self.target is None:
            return
        with self._lock:
            self._write_event(event, fields)

    def _write_event(self, event: str, fields: Mapping[str, Any]) -> None:
        line = (
            json.dumps(
                {
                    "time": round(time.time(), 3),
                    "event": event,
                    **fields,
                    **self.compute_progress(),
                },
                ensure_ascii=False,
            )
            + "\n"
        )
        if self.target == "-":
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        try:
            self._append_line(line)
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "output.events=%s cannot be written (%s): some events are lost",
                    self.target,
                    error.strerror,
                )
            self._has_warned = True

    def _append_line(self, line: str) -> None:
        """Append a line to the file, which is created where it is missing.

        A named pipe takes it only while somebody reads it; opening one without a reader would block forever,
        hence O_NONBLOCK.
        """
        path = Path(self.target or "").expanduser()
        if (descriptor := self._pipe_descriptor) is None:
            try:
                descriptor = os.open(
                    path,
                    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC,
                    0o666,
                )
            except OSError as error:
                if not line and error.errno == errno.ENXIO and path.is_fifo():
                    return  # a reader may come later
                raise
            # a pipe stays open: closing it would be the end of file to its reader
            is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
            self._pipe_descriptor = descriptor if is_pipe else None
        try:
            self._write_bytes(descriptor, line)
        except BlockingIOError:
            raise
        except OSError:
            self._pipe_descriptor = None
            raise
        finally:
            if self._pipe_descriptor is None:
                os.close(descriptor)

    def _write_bytes(self, descriptor: int, line: str) -> None:
        """Write a line; where an earlier one was written in part, end that one first."""
        unsent_bytes = (b"\n" if self._has_partial_line and line else b"") + line.encode(
            "utf-8", "backslashreplace"
        )
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        while unsent_bytes:
            poller.poll(1000 * _PIPE_TIMEOUT_SECONDS)
            unsent_bytes = unsent_bytes[os.write(descriptor, unsent_bytes) :]
            self._has_partial_line = bool(unsent_bytes)

    def compute_progress(self) -> dict[str, float | None]:
        """Return the numbers of jobs done, failed and left, and the estimated seconds for those left.

        The last two are None where jobs are added during the run.
        """
        num_done, num_failed, num_elsewhere = (
            self.counters[name] for name in ("done", "failed", "elsewhere")
        )
        if self.num_jobs is None:
            return {"done": num_done, "failed": num_failed, "left": None, "seconds_left": None}
        num_left = self.num_jobs - num_done - num_failed - num_elsewhere
        seconds_per_job = (time.monotonic() - self._start_time) / max(1, num_done + num_failed)
        return {
            "done": num_done,
            "failed": num_failed,
            "left": num_left,
            "seconds_left": round(seconds_per_job * num_left, 1) if num_done + num_failed else None,
        }

    def announce_job(self, text: str) -> None:
        """Log a line about a job, with the progress of the run."""
        progress = self.compute_progress()
        total_text = "" if self.num_jobs is None else f" of {self.num_jobs}"
        failed_text = f", {progress['failed']} failed" if progress["failed"] else ""
        remaining_text = "" if progress["left"] is None else f", {progress['left']} left"
        if progress["left"]:
            remaining_text += f", about {format_duration(progress['seconds_left'] or 0)}"
        logger.log(
            ANNOUNCEMENT_LEVEL,
            "job       %s; %d%s done%s%s",
            text,
            progress["done"],
            total_text,
            failed_text,
            remaining_text,
        )
