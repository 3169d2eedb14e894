"""Run log of a batch run: timeline record (``runs/RUN.json``), table of videos, and gallery page.

A process of its own writes them again and again during the run (see `wan_dist.output.gallery.background`).
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.output.gallery.background import PageWriter
from wan_dist.output.gallery.sheet import SheetError, get_sheet_path, has_current_sheet, write_sheet
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption

_GIB = 2**30
_MIN_PAGE_INTERVAL_SECONDS = 60.0
"""Least time between two writes of the page, and before the first."""
_MAX_PAGE_TIME_FRACTION = 1 / 20
"""Largest part of the time that may be spent on writing the page."""
_MAX_QUICK_RECORDS = 1000
"""Number of records whose page is written within a second or two."""
_CLOSE_TIMEOUT_SECONDS = 120.0
"""Seconds for which the end of the run waits for a page that is being written."""
_TERMINATE_TIMEOUT_SECONDS = 5.0


@dataclass
class RunLog:
    """Log of one run in an output folder; ``run_stages`` are of no job, such as text encoding for all."""

    folder: Path
    run_id: str
    arguments: Sequence[str]
    num_ranks: int
    num_jobs: int | None
    """None where jobs are added during the run; the record has those that have ended then."""
    run_stages: Mapping[str, Mapping[str, float]]
    plans: list[RunPlan] = field(default_factory=list)
    start_time: float = field(default_factory=time.time)
    _next_page_time: float = field(
        default_factory=lambda: time.monotonic() + _MIN_PAGE_INTERVAL_SECONDS
    )
    _page_process: "_PageProcess | None" = None

    def write_page(self, progress: Mapping[str, Any], *, has_ended: bool = False) -> None:
        """Write record, table and page; without ``has_ended`` in the background, and only if they are due.

        A failure, such as a full disk, is logged and does not end the run.
        """
        if not has_ended:
            self._write_in_background(progress)
            return
        if self._page_process is not None:
            self._page_process.close(wait=preemption.requested_by is None)
        try:
            if (
                preemption.requested_by is not None
                and _count_records(self.folder) > _MAX_QUICK_RECORDS
            ):
                return  # there is little time, and the run may be started again
            page_path = PageWriter(self.folder).write(
                self._build_record(progress, has_ended=True), self.run_stages
            )
        except (OSError, InputError) as error:
            self._log_write_failure(error)
            return
        logger.info("page      %s", page_path)

    def _write_in_background(self, progress: Mapping[str, Any]) -> None:
        if self._page_process is None:
            if time.monotonic() < self._next_page_time:
                return
            self._page_process = _PageProcess(self.folder)
        elif self._page_process.is_busy:
            try:
                seconds = self._page_process.poll_write_seconds()
            except (OSError, ValueError) as error:
                self._log_write_failure(error)
                seconds = 0.0
            if seconds is not None:
                self._next_page_time = time.monotonic() + max(
                    _MIN_PAGE_INTERVAL_SECONDS, seconds / _MAX_PAGE_TIME_FRACTION
                )
        if not self._page_process.is_busy and time.monotonic() >= self._next_page_time:
            try:
                self._page_process.start_writing(
                    {
                        "run": self._build_record(progress, has_ended=False),
                        "stages": self.run_stages,
                    }
                )
            except OSError as error:
                self._log_write_failure(error)
                self._next_page_time = float("inf")

    def _log_write_failure(self, error: Exception) -> None:
        logger.warning(
            "the page of %s could not be written (%s); python -m launch gallery makes it",
            self.folder,
            error,
        )

    def _build_record(self, progress: Mapping[str, Any], *, has_ended: bool) -> dict[str, Any]:
        """Return the run's record without the spans."""
        record = {
            "run": self.run_id,
            "began": round(self.start_time, 3),
            "ended": round(time.time(), 3) if has_ended else None,
            "command": ["python", "-m", "wan_dist.run", *self.arguments],
            "ranks": self.num_ranks,
            "jobs": progress["done"] + progress["failed"]
            if self.num_jobs is None
            else self.num_jobs,
            "done": progress["done"],
            "failed": progress["failed"],
        }
        if not self.plans:
            return record
        return record | _summarize_plan(max(self.plans, key=lambda plan: plan.num_tokens))


class _PageProcess:
    """A child process that writes the page on request, with low priority; it ends with this process."""

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, "-m", "wan_dist.output.gallery.background", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None
        self.is_busy = False

    def start_writing(self, request: Mapping[str, Any]) -> None:
        """Request a write of the page; raises OSError where no process can be started."""
        if self._process is None:
            python_path = os.pathsep.join(
                [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": python_path},
                process_group=0,  # not reached by signals that a terminal sends to the run
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self.is_busy = True

    def poll_write_seconds(self) -> float | None:
        """Return the seconds of the last write, None while it lasts.

        Raises OSError if the process has ended, and ValueError if the write failed.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        poller = select.poll()
        poller.register(self._process.stdout)
        if not poller.poll(0):
            return None
        line = self._process.stdout.readline()
        self.is_busy = False
        if not line:
            self._stop_process()
            raise ChildProcessError("the process that writes the page has ended")
        response = json.loads(line)
        if response["fault"] is not None:
            raise ValueError(response["fault"])
        return float(response["seconds"])

    def close(self, *, wait: bool) -> None:
        """End the process, with ``wait`` after it has finished a write that has started."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(_CLOSE_TIMEOUT_SECONDS if wait else 0)
        self._stop_process()

    def _stop_process(self) -> None:
        """Terminate the process, kill it if that takes too long, and close its pipes."""
        if self._process is None:
            return
        self._process.terminate()  # its handler removes partial files
        try:
            self._process.wait(_TERMINATE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent data cannot be flushed
                    pipe.close()
        self._process, self.is_busy = None, False


def _count_records(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.name.endswith(".json") for entry in entries)


def _summarize_plan(plan: RunPlan) -> dict[str, Any]:
    """Return the planned memory and the budget of one rank, with host memory divided among a node's ranks."""
    ranks_per_node = plan.ranks_per_node
    memory_by_stage = {
        stage_memory.name: {
            "seconds": None,
            "gpu_gib": round(stage_memory.gpu_bytes / _GIB, 3),
            "host_gib": round(stage_memory.host_bytes / ranks_per_node / _GIB, 3),
        }
        for stage_memory in plan.stage_memories
    }
    if plan.budget.gpu_bytes is None:  # on a CPU, tensors are in host memory
        for stage_memory in plan.stage_memories:
            memory_by_stage[stage_memory.name] |= {
                "gpu_gib": None,
                "host_gib": round(
                    (stage_memory.host_bytes / ranks_per_node + stage_memory.gpu_bytes) / _GIB, 3
                ),
            }
    gpu_gib = None if plan.budget.gpu_bytes is None else round(plan.budget.gpu_bytes / _GIB, 3)
    return {
        "plan": memory_by_stage,
        "budget": {
            "gpu_gib": gpu_gib,
            "host_gib": round(plan.budget.host_bytes / ranks_per_node / _GIB, 3),
        },
    }


def add_contact_sheet(video: Path, num_frames: int) -> None:
    """Write a video's contact sheet beside it, unless a picture of another origin has that name.

    A sheet that cannot be made is logged, and the page does without it.
    """
    if has_current_sheet(video):
        return
    try:
        write_sheet(video, get_sheet_path(video), num_frames=num_frames)
    except SheetError as error:
        logger.warning("%s", error)
