"""The records beside a folder's videos -> what is shown of them; files of others and broken ones are passed over."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wan_dist.output.gallery.fields import listed, moment, natural, number, table, text, whole
from wan_dist.runtime.errors import InputError, first_line

_NOT_IN_RESULT = ("output.", "parallel.", "fsdp.", "memory.", "cache.dir", "cache.size_gib", "device", "jobs", "retry_failed")
"""Settings, or beginnings of them, that do not change a video's frames; of memory's one does."""
_LOSSLESS = {"quant": ("none",), "attention": ("auto", "fa4", "fa3", "fa2", "cudnn", "flash", "sdpa", "sdpa16"), "cache.steps": (None,)}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One video, or one that failed. Numbers are None and texts empty where the record does not say."""

    path: Path
    """The record's file."""
    name: str
    """Of the files beside it, without suffix."""
    video: Path | None
    """The mp4 or PNG beside the record, if it is there."""
    status: str
    """done or failed."""
    error: str
    run: str
    rank: int | None
    """The first of those that made it."""
    job: str
    """File and line."""
    task: str
    prompt: str
    seed: int | None
    width: int | None
    height: int | None
    num_frames: int | None
    fps: int | None
    began: float | None
    """Seconds since the epoch."""
    seconds: float | None
    step_seconds: float | None
    tflops: float | None
    """Of each rank."""
    peak_gpu_gib: float | None
    peak_host_gib: float | None
    distance: tuple[str, ...]
    """The options in use that change the result, as quant=int8."""
    digest: str
    video_digest: str
    machine: str
    settings: Mapping[str, object] = field(repr=False)
    """All settings by dotted key."""
    versions: Mapping[str, str] = field(repr=False)
    stages: tuple[Mapping[str, Mapping[str, float]], ...] = field(repr=False)
    """Of each rank, by stage, its seconds and GiB."""
    memory: Mapping[str, Mapping[str, float]] = field(repr=False)
    """By stage, planned and measured GiB of a rank."""

    @property
    def steps(self) -> int | None:
        """Denoising steps."""
        return whole(self.settings, "sample.steps")

    @property
    def peak(self) -> tuple[float, str] | None:
        """The most memory in use, in GiB, and whose: GPU or host."""
        if self.peak_gpu_gib is not None:
            return self.peak_gpu_gib, "GPU"
        return None if self.peak_host_gib is None else (self.peak_host_gib, "host")

    @cached_property
    def recipe(self) -> dict[str, object]:
        """What the frames depend on, by dotted key: settings, with the prompt as it was read and the seed as it was drawn."""
        own = {key: value for key, value in self.settings.items() if key == "memory.vae_dtype" or not key.startswith(_NOT_IN_RESULT)}
        return own | {key: value for key, value in (("prompt", self.prompt), ("seed", self.seed)) if value not in ("", None)}


Seen = dict[str, tuple[tuple[object, ...], Record | None]]
"""Records by their files' names, with what shows whether they have changed."""


def read_records(folder: Path, seen: Seen | None = None) -> list[Record]:
    """Return the records of a folder by run and name; what is no record, or names a file elsewhere, is passed over.

    Those in ``seen`` that have not changed are taken from there, and it comes to hold all. Raises InputError where there is no such
    folder.
    """
    try:
        files = files_in(folder)
    except OSError as fault:
        raise InputError(f"{folder} cannot be looked through: {fault.strerror}; give the folder that the videos are in") from None
    before: Seen = {} if seen is None else seen
    now: Seen = {}
    for name in filter(is_record_name, files):
        state = _state(folder / name, files)
        if name in before and before[name][0] == state:
            now[name] = before[name]
        else:
            entry = read_object(folder / name)
            now[name] = state, None if entry is None else _record(folder / name, entry, files)
    before.clear()
    before.update(now)
    found = [record for _, record in now.values() if record is not None]
    return sorted(found, key=lambda record: (record.run, natural(record.name)))


def _state(path: Path, files: set[str]) -> tuple[object, ...]:
    """Return what a record is read from: its file, and which results are beside it."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino, *(path.stem + suffix in files for suffix in (".mp4", ".png"))


def files_in(folder: Path) -> set[str]:
    """Return the names of a folder's files: no folders, and nothing that one would wait for; raises OSError."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def is_record_name(name: str) -> bool:
    """Whether a file may be a record: those being written begin with a dot."""
    return name.endswith(".json") and not name.startswith(".")


def read_object(path: Path) -> dict[str, object] | None:
    """Return the object in a JSON file, None for anything else."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file here, not a way to another folder."""
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def _record(path: Path, entry: dict[str, object], files: set[str]) -> Record | None:
    config = table(entry, "config")
    is_failed = entry.get("status") == "failed"
    is_record = text(config, "task") or (entry.get("status") in ("done", "failed") and "name" in entry)
    if not is_record or not is_plain(text(entry, "name") or path.stem):
        return None
    settings = dict(_leaves(config))
    size = re.fullmatch(r"(\d{1,5})[*xX×](\d{1,5})", text(settings, "size").strip())
    width, height = (int(size[1]), int(size[2])) if size else (None, None)
    job = table(entry, "job")
    return Record(
        path=path,
        name=path.stem,
        video=None if is_failed else _video(path, text(entry, "file"), files),
        status="failed" if is_failed else "done",
        error=first_line(text(entry, "error") or "no reason was kept")[:500] if is_failed else "",
        run=text(entry, "run"),
        rank=whole(entry, "rank"),
        job=f"{text(job, 'file')}, line {whole(job, 'line')}" if job else "",
        task=text(settings, "task"),
        prompt=text(entry, "prompt") or text(settings, "prompt"),
        seed=whole(settings, "seed") if whole(entry, "seed") is None else whole(entry, "seed"),
        width=whole(entry, "width") or width,
        height=whole(entry, "height") or height,
        num_frames=whole(entry, "num_frames") or whole(settings, "frame_num"),
        fps=whole(entry, "fps") or whole(settings, "fps"),
        began=moment(entry, "began"),
        seconds=number(entry, "seconds"),
        step_seconds=number(entry, "step_seconds"),
        tflops=number(entry, "tflops"),
        peak_gpu_gib=number(entry, "peak_gpu_gib"),
        peak_host_gib=number(entry, "peak_host_gib"),
        distance=_distance(entry, settings),
        digest=text(entry, "digest"),
        video_digest=text(entry, "video_digest"),
        machine=text(entry, "machine"),
        settings=settings,
        versions={key: text(table(entry, "versions"), key) for key in table(entry, "versions")},
        stages=tuple(_numbers(stages) for stages in (entry.get("stages"), *listed(entry, "other_ranks"))),
        memory=_numbers(entry.get("memory")),
    )


def _video(path: Path, told: str, files: set[str]) -> Path | None:
    """Return the result beside a record; of the name it is told by only the suffix counts."""
    suffixes = (".png", ".mp4") if told.endswith(".png") else (".mp4", ".png")
    for name in (path.stem + suffix for suffix in suffixes):
        video = path.with_name(name)
        if name in files and (not video.is_symlink() or video.resolve().parent == path.parent.resolve()):
            return video
    return None


def _distance(entry: dict[str, object], settings: dict[str, object]) -> tuple[str, ...]:
    if "distance" in entry:
        return tuple(text({"": item}, "") for item in listed(entry, "distance") if isinstance(item, str))
    return tuple(f"{key}={settings[key]}" for key, exact in _LOSSLESS.items() if key in settings and settings[key] not in exact)


def _leaves(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict) and prefix.count(".") < 8:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text({key: value}, key) if isinstance(value, str) else value


def _numbers(stages: object) -> dict[str, dict[str, float]]:
    """Return the numbers of each stage."""
    found = {}
    for stage, entry in (stages if isinstance(stages, dict) else {}).items():
        if isinstance(entry, dict):
            found[stage] = {key: value for key in entry if (value := number(entry, key)) is not None}
    return found
