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

from wan_dist.parallel.shared_counters import SharedCounters
from wan_dist.runtime.durations import format_duration
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import ANNOUNCEMENT_LEVEL, logger

_PIPE_TIMEOUT_SECONDS = 1.0
"""Seconds for a pipe's reader to make room."""


class JobEvents:
    """``target``: the file that lines of JSON are added to, - for standard output, None for none; ``total``: the jobs that are to be made.

    Counts are of all ranks: each tells of its own jobs. Raises InputError for a file that cannot be written at the start; what happens to
    it later, a full disk or a reader that is gone, is logged once and the run goes on.
    """

    def __init__(self, target: str | None, num_jobs: int, counters: SharedCounters) -> None:
        self.target, self.num_jobs, self.counters = target, num_jobs, counters
        self._start_time = time.monotonic()
        self._pipe_descriptor: int | None = None
        self._has_partial_line, self._has_warned = False, False
        if target not in (None, "-"):
            try:
                self._append_line("")
            except OSError as error:
                raise InputError(
                    f"output.events={self.target} cannot be written: {error.strerror}; name another file, or - for the output"
                ) from None

    def write_event(self, event: str, **fields: Any) -> None:
        """Write a line of JSON: its time, the event, facts, and how many jobs are done, failed and left."""
        if self.target is None:
            return
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
                    "output.events=%s cannot be written (%s): some events are missing there",
                    self.target,
                    error.strerror,
                )
            self._has_warned = True

    def _append_line(self, line: str) -> None:
        """Add a line to the file, which is created; to a pipe only while somebody reads it: opening it would else wait for ever."""
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
            self._pipe_descriptor = (
                descriptor if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else None
            )  # closing it would be the end to its reader
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
        """Return jobs done, failed and left, and the seconds that those are likely to take."""
        num_done, num_failed, num_elsewhere = (
            self.counters[name] for name in ("done", "failed", "elsewhere")
        )
        num_left = self.num_jobs - num_done - num_failed - num_elsewhere
        seconds_per_job = (time.monotonic() - self._start_time) / max(1, num_done + num_failed)
        return {
            "done": num_done,
            "failed": num_failed,
            "left": num_left,
            "seconds_left": round(seconds_per_job * num_left, 1) if num_done + num_failed else None,
        }

    def announce_job(self, text: str) -> None:
        """Log a line about a job, with how many are left."""
        progress = self.compute_progress()
        remaining_text = f"{progress['left']} left" + (
            f", about {format_duration(progress['seconds_left'] or 0)}" if progress["left"] else ""
        )
        failed_text = f", {progress['failed']} failed" if progress["failed"] else ""
        logger.log(
            ANNOUNCEMENT_LEVEL,
            "job       %s; %d of %d done%s, %s",
            text,
            progress["done"],
            self.num_jobs,
            failed_text,
            remaining_text,
        )
