"""Run records of a folder: the stages of each rank over time, and the plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wan_dist.output.gallery.records import (
    is_record_name,
    list_file_names,
    make_natural_key,
    read_json_object,
)
from wan_dist.output.json_values import (
    get_integer,
    get_list,
    get_number,
    get_object,
    get_text,
    get_texts,
    get_timestamp,
)


class Span(NamedTuple):
    """A stage of a job on a rank."""

    rank: int
    stage: str
    job: str
    began: float
    """Seconds since the epoch."""
    seconds: float
    gpu_gib: float | None
    host_gib: float | None

    @property
    def stage_kind(self) -> str:
        """First word of the stage, its name in the plan."""
        return self.stage.split()[0]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A batch run; where its record lacks a value, numbers are None and texts empty."""

    name: str
    began: float | None
    """Seconds since the epoch."""
    ended: float | None
    command: tuple[str, ...]
    ranks: int | None
    jobs: int | None
    done: int | None
    failed: int | None
    spans: tuple[Span, ...] = field(repr=False)
    plan_by_stage: Mapping[str, Mapping[str, float]]
    """Planned seconds, gpu_gib and host_gib, by stage."""
    memory_budget: Mapping[str, float]
    """Budget of a rank: gpu_gib and host_gib."""

    @property
    def seconds(self) -> float | None:
        """Duration of the run, None if its begin or end is unknown."""
        return (
            self.ended - self.began if self.began is not None and self.ended is not None else None
        )


def read_runs(folder: Path) -> list[RunRecord]:
    """Return the runs recorded in FOLDER/runs, sorted by name, which begins with the date.

    Other files there are skipped.
    """
    try:
        paths = [
            folder / "runs" / name
            for name in list_file_names(folder / "runs")
            if is_record_name(name)
        ]
    except OSError:
        return []
    paths.sort(key=lambda path: make_natural_key(path.stem))
    return [
        _parse_run(path, entry)
        for path in paths
        if (entry := read_json_object(path)) is not None and "run" in entry
    ]


def _parse_run(path: Path, entry: dict[str, object]) -> RunRecord:
    return RunRecord(
        name=path.stem,
        began=get_timestamp(entry, "began"),
        ended=get_timestamp(entry, "ended"),
        command=tuple(get_texts(entry, "command")),
        ranks=get_integer(entry, "ranks"),
        jobs=get_integer(entry, "jobs"),
        done=get_integer(entry, "done"),
        failed=get_integer(entry, "failed"),
        spans=tuple(
            span
            for item in get_list(entry, "spans")
            if isinstance(item, dict) and (span := _parse_span(item)) is not None
        ),
        plan_by_stage={
            stage: _get_numbers(get_object(entry, "plan"), stage)
            for stage in get_object(entry, "plan")
        },
        memory_budget=_get_numbers(entry, "budget"),
    )


def _parse_span(entry: dict[str, object]) -> Span | None:
    rank, began, seconds, stage = (
        get_integer(entry, "rank"),
        get_timestamp(entry, "began"),
        get_number(entry, "seconds"),
        get_text(entry, "stage").strip(),
    )
    if (
        rank is None
        or not 0 <= rank < 4096
        or began is None
        or seconds is None
        or seconds < 0
        or not stage
    ):
        return None
    return Span(
        rank,
        stage,
        get_text(entry, "job"),
        began,
        seconds,
        get_number(entry, "gpu_gib"),
        get_number(entry, "host_gib"),
    )


def _get_numbers(entry: Mapping[str, object], key: str) -> dict[str, float]:
    numbers = get_object(entry, key)
    return {name: value for name in numbers if (value := get_number(numbers, name)) is not None}
