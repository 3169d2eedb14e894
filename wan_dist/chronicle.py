"""What a run with jobs leaves for people: what each rank did when (``runs/RUN.json``), a table of its videos, the page that shows all."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.aside import written_aside
from wan_dist.errors import InputError
from wan_dist.gallery.page import write_page
from wan_dist.gallery.records import Record, read_records
from wan_dist.gallery.sheet import SheetError, is_current, sheet_of, write_sheet
from wan_dist.gallery.table import write_table
from wan_dist.log import logger
from wan_dist.plan import Plan

_GIB = 2**30
_PAGE_SECONDS = 60.0
"""At least, between two times that the page is written."""


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
    _written: float = field(default_factory=time.monotonic)

    def write(self, standing: Mapping[str, Any], *, ended: bool = False) -> None:
        """Write all of it; without ``ended`` only if the last time is a while ago. A disk that is full does not end the run here."""
        if not ended and time.monotonic() - self._written < _PAGE_SECONDS:
            return
        try:
            records = [record for record in read_records(self.folder) if record.run == self.run]
            self._write_run(records, standing, ended=ended)
            if records:
                write_table(self.folder / "runs" / f"{self.run}.json", records)
            page = write_page(self.folder)
        except (OSError, InputError) as fault:
            logger.warning("the page of %s could not be written (%s); python -m launch gallery makes it", self.folder, fault)
            return
        self._written = time.monotonic()
        if ended:
            logger.info("page      %s", page)

    def _write_run(self, records: Iterable[Record], standing: Mapping[str, Any], *, ended: bool) -> None:
        spans = _spans(0, None, self.own)
        for record in records:
            for place, stages in enumerate(record.stages):
                spans += _spans((record.rank or 0) + place, record.name, stages)
        told = {
            "run": self.run,
            "began": round(self.began, 3),
            "ended": round(time.time(), 3) if ended else None,
            "command": ["python", "-m", "wan_dist.run", *self.arguments],
            "ranks": self.num_ranks,
            "jobs": self.num_jobs,
            "done": standing["done"],
            "failed": standing["failed"],
            "spans": spans,
        }
        if self.plans:
            told |= _planned(max(self.plans, key=lambda plan: plan.num_tokens))
        (self.folder / "runs").mkdir(exist_ok=True)
        with written_aside(self.folder / "runs" / f"{self.run}.json") as aside:
            aside.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")


def _spans(rank: int, job: str | None, stages: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "stage": stage,
            "job": job,
            "began": entry["began"],
            "seconds": entry["seconds"],
            "gpu_gib": entry.get("peak_gpu_gib"),
            "host_gib": entry.get("host_gib"),
        }
        for stage, entry in stages.items()
        if "began" in entry and "seconds" in entry
    ]


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
