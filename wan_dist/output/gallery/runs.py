"""The records of a folder's runs: what each rank did when, and what had been planned."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wan_dist.output.gallery.fields import listed, moment, natural, number, table, text, whole
from wan_dist.output.gallery.records import files_in, is_record_name, read_object


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
    def kind(self) -> str:
        """The stage's first word, which the plan knows it by."""
        return self.stage.split()[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a batch. Numbers are None and texts empty where its record does not say."""

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
    plan: Mapping[str, Mapping[str, float]]
    """By stage, planned seconds, gpu_gib and host_gib."""
    budget: Mapping[str, float]
    """gpu_gib and host_gib."""

    @property
    def seconds(self) -> float | None:
        """From its beginning to its end."""
        return self.ended - self.began if self.began is not None and self.ended is not None else None


def read_runs(folder: Path) -> list[Run]:
    """Return the runs that FOLDER/runs tells of, by name, which begins with the date; what is no record of one is passed over."""
    try:
        paths = [folder / "runs" / name for name in files_in(folder / "runs") if is_record_name(name)]
    except OSError:
        return []
    paths.sort(key=lambda path: natural(path.stem))
    return [_run(path, entry) for path in paths if (entry := read_object(path)) is not None and "run" in entry]


def _run(path: Path, entry: dict[str, object]) -> Run:
    return Run(
        name=path.stem,
        began=moment(entry, "began"),
        ended=moment(entry, "ended"),
        command=tuple(text({"": word}, "") for word in listed(entry, "command") if isinstance(word, str)),
        ranks=whole(entry, "ranks"),
        jobs=whole(entry, "jobs"),
        done=whole(entry, "done"),
        failed=whole(entry, "failed"),
        spans=tuple(span for item in listed(entry, "spans") if isinstance(item, dict) and (span := _span(item)) is not None),
        plan={stage: _numbers(table(entry, "plan"), stage) for stage in table(entry, "plan")},
        budget=_numbers(entry, "budget"),
    )


def _span(item: dict[str, object]) -> Span | None:
    rank, began, seconds, stage = whole(item, "rank"), moment(item, "began"), number(item, "seconds"), text(item, "stage").strip()
    if rank is None or not 0 <= rank < 4096 or began is None or seconds is None or seconds < 0 or not stage:
        return None
    return Span(rank, stage, text(item, "job"), began, seconds, number(item, "gpu_gib"), number(item, "host_gib"))


def _numbers(entry: Mapping[str, object], key: str) -> dict[str, float]:
    inner = table(entry, key)
    return {name: value for name in inner if (value := number(inner, name)) is not None}
