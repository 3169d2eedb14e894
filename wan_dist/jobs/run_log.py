"""What a run with jobs leaves for people: what each rank did when (``runs/RUN.json``), a table of its videos, the page that shows all."""

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
from wan_dist.output.gallery.sheet import SheetError, is_current, sheet_of, write_sheet
from wan_dist.planning.plan import Plan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption

_GIB = 2**30
_PAGE_SECONDS = 60.0
"""At least, between two times that the page is written, and before the first."""
_PAGE_SHARE = 1 / 20
"""Of the time, at the most, in which the page is being written."""
_SOON_WRITTEN = 1000
"""Records, of which a page is written within a second or two."""
_PATIENCE = 120.0
"""Seconds that the run's end waits for a page that is being written."""
_GRACE = 5.0


@dataclass
class Chronicle:
    """Of one run in a folder; ``own`` are stages of the run itself, such as that of the texts."""

    folder: Path
    run: str
    arguments: Sequence[str]
    num_ranks: int
    num_jobs: int
    own: Mapping[str, Mapping[str, float]]
    plans: list[Plan] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    _due: float = field(default_factory=lambda: time.monotonic() + _PAGE_SECONDS)
    _background: "_Background | None" = None

    def write(self, standing: Mapping[str, Any], *, ended: bool = False) -> None:
        """Write all of it; without ``ended`` only if the last time is a while ago, and in the background.

        A disk that is full does not end the run here.
        """
        if not ended:
            self._write_in_background(standing)
            return
        if self._background is not None:
            self._background.close(wait=preemption.asked_by is None)
        try:
            if preemption.asked_by is not None and _num_records(self.folder) > _SOON_WRITTEN:
                return  # there is little time; who asked for the end may start it again
            page = PageWriter(self.folder).write(self._told(standing, ended=True), self.own)
        except (OSError, InputError) as fault:
            self._say_why_not(fault)
            return
        logger.info("page      %s", page)

    def _write_in_background(self, standing: Mapping[str, Any]) -> None:
        if self._background is None:
            if time.monotonic() < self._due:
                return
            self._background = _Background(self.folder)
        elif self._background.is_busy:
            try:
                seconds = self._background.seconds()
            except (OSError, ValueError) as fault:
                self._say_why_not(fault)
                seconds = 0.0
            if seconds is not None:
                self._due = time.monotonic() + max(_PAGE_SECONDS, seconds / _PAGE_SHARE)
        if not self._background.is_busy and time.monotonic() >= self._due:
            try:
                self._background.begin({"run": self._told(standing, ended=False), "stages": self.own})
            except OSError as fault:
                self._say_why_not(fault)
                self._due = float("inf")

    def _say_why_not(self, fault: Exception) -> None:
        logger.warning("the page of %s could not be written (%s); python -m launch gallery makes it", self.folder, fault)

    def _told(self, standing: Mapping[str, Any], *, ended: bool) -> dict[str, Any]:
        """Return what the run's record says, but for the spans."""
        told = {
            "run": self.run,
            "began": round(self.began, 3),
            "ended": round(time.time(), 3) if ended else None,
            "command": ["python", "-m", "wan_dist.run", *self.arguments],
            "ranks": self.num_ranks,
            "jobs": self.num_jobs,
            "done": standing["done"],
            "failed": standing["failed"],
        }
        return told | (_planned(max(self.plans, key=lambda plan: plan.num_tokens)) if self.plans else {})


class _Background:
    """A process that writes the page: one time after the other, with low priority, for as long as this one lives."""

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, "-m", "wan_dist.output.gallery.background", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None
        self.is_busy = False

    def begin(self, told: Mapping[str, Any]) -> None:
        """Have it written; raises OSError where no process can be started."""
        if self._process is None:
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                process_group=0,  # signals that a terminal sends to the run are not for it
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told).encode() + b"\n")
        self._process.stdin.flush()
        self.is_busy = True

    def seconds(self) -> float | None:
        """Return how long it took, None while it is at it; raises OSError or ValueError if it has failed."""
        assert self._process is not None
        assert self._process.stdout is not None
        answers = select.poll()
        answers.register(self._process.stdout)
        if not answers.poll(0):
            return None
        line = self._process.stdout.readline()
        self.is_busy = False
        if not line:
            self._end()
            raise ChildProcessError("the process that writes it has ended")
        answer = json.loads(line)
        if answer["fault"] is not None:
            raise ValueError(answer["fault"])
        return float(answer["seconds"])

    def close(self, *, wait: bool) -> None:
        """Let it end after what it is at, and wait for that; or end it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(_PATIENCE if wait else 0)
        self._end()

    def _end(self) -> None:
        """Leave nothing running and nothing open."""
        if self._process is None:
            return
        self._process.terminate()  # it takes away what is half written
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not received
                    pipe.close()
        self._process, self.is_busy = None, False


def _num_records(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.name.endswith(".json") for entry in entries)


def _planned(plan: Plan) -> dict[str, Any]:
    """Return what a rank was to take, and may: the host's memory shared evenly."""
    ranks = plan.ranks_per_node
    stages = {
        use.stage: {"seconds": None, "gpu_gib": round(use.gpu_bytes / _GIB, 3), "host_gib": round(use.host_bytes / ranks / _GIB, 3)}
        for use in plan.uses
    }
    assert plan.budget is not None
    if plan.budget.gpu is None:  # tensors are on the host
        for use in plan.uses:
            stages[use.stage] |= {"gpu_gib": None, "host_gib": round((use.host_bytes / ranks + use.gpu_bytes) / _GIB, 3)}
    gpu = None if plan.budget.gpu is None else round(plan.budget.gpu / _GIB, 3)
    return {"plan": stages, "budget": {"gpu_gib": gpu, "host_gib": round(plan.budget.host / ranks / _GIB, 3)}}


def add_sheet(video: Path, num_frames: int) -> None:
    """Write a video's contact sheet beside it, unless somebody else's picture is there; the page does without one that cannot be made."""
    if is_current(video):
        return
    try:
        write_sheet(video, sheet_of(video), num_frames=num_frames)
    except SheetError as fault:
        logger.warning("%s", fault)
