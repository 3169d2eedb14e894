"""The records beside a folder's videos -> what is shown of them; files of others and broken ones are passed over."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wan_dist.output.gallery.fields import (
    get_integer,
    get_list,
    get_number,
    get_object,
    get_text,
    get_timestamp,
    make_natural_key,
)
from wan_dist.runtime.errors import InputError, get_first_line

_IRRELEVANT_PREFIXES = (
    "output.",
    "parallel.",
    "fsdp.",
    "memory.",
    "cache.dir",
    "cache.size_gib",
    "device",
    "jobs",
    "retry_failed",
)
"""Settings, or beginnings of them, that do not change a video's frames; of memory's one does."""
_LOSSLESS_VALUES = {
    "quant": ("none",),
    "attention": ("auto", "fa4", "fa3", "fa2", "cudnn", "flash", "sdpa", "sdpa16"),
    "cache.steps": (None,),
}


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
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
    job_source: str
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
    lossy_options: tuple[str, ...]
    """The options in use that change the result, as quant=int8."""
    digest: str
    video_digest: str
    machine: str
    settings: Mapping[str, object] = field(repr=False)
    """All settings by dotted key."""
    versions: Mapping[str, str] = field(repr=False)
    stages_by_rank: tuple[Mapping[str, Mapping[str, float]], ...] = field(repr=False)
    """Of each rank, by stage, its seconds and GiB."""
    memory_by_stage: Mapping[str, Mapping[str, float]] = field(repr=False)
    """By stage, planned and measured GiB of a rank."""

    @property
    def steps(self) -> int | None:
        """Denoising steps."""
        return get_integer(self.settings, "sample.steps")

    @property
    def peak_memory(self) -> tuple[float, str] | None:
        """The most memory in use, in GiB, and whose: GPU or host."""
        if self.peak_gpu_gib is not None:
            return self.peak_gpu_gib, "GPU"
        return None if self.peak_host_gib is None else (self.peak_host_gib, "host")

    @cached_property
    def result_settings(self) -> dict[str, object]:
        """What the frames depend on, by dotted key: settings, with the prompt as it was read and the seed as it was drawn."""
        relevant_settings = {
            key: value
            for key, value in self.settings.items()
            if key == "memory.vae_dtype" or not key.startswith(_IRRELEVANT_PREFIXES)
        }
        return relevant_settings | {
            key: value
            for key, value in (("prompt", self.prompt), ("seed", self.seed))
            if value not in ("", None)
        }


RecordCache = dict[str, tuple[tuple[object, ...], VideoRecord | None]]
"""Records by their files' names, with what shows whether they have changed."""


def read_records(folder: Path, record_cache: RecordCache | None = None) -> list[VideoRecord]:
    """Return the records of a folder by run and name; what is no record, or names a file elsewhere, is passed over.

    Those in ``seen`` that have not changed are taken from there, and it comes to hold all. Raises InputError where there is no such
    folder.
    """
    try:
        file_names = list_file_names(folder)
    except OSError as fault:
        raise InputError(
            f"{folder} cannot be looked through: {fault.strerror}; give the folder that the videos are in"
        ) from None
    previous_cache: RecordCache = {} if record_cache is None else record_cache
    current_cache: RecordCache = {}
    for name in filter(is_record_name, file_names):
        file_state = _read_file_state(folder / name, file_names)
        if name in previous_cache and previous_cache[name][0] == file_state:
            current_cache[name] = previous_cache[name]
        else:
            entry = read_json_object(folder / name)
            current_cache[name] = (
                file_state,
                None if entry is None else _parse_record(folder / name, entry, file_names),
            )
    previous_cache.clear()
    previous_cache.update(current_cache)
    records = [record for _, record in current_cache.values() if record is not None]
    return sorted(records, key=lambda record: (record.run, make_natural_key(record.name)))


def _read_file_state(path: Path, file_names: set[str]) -> tuple[object, ...]:
    """Return what a record is read from: its file, and which results are beside it."""
    try:
        file_stat = path.stat()
    except OSError:
        return ()
    return (
        file_stat.st_mtime_ns,
        file_stat.st_size,
        file_stat.st_ino,
        *(path.stem + suffix in file_names for suffix in (".mp4", ".png")),
    )


def list_file_names(folder: Path) -> set[str]:
    """Return the names of a folder's files: no folders, and nothing that one would wait for; raises OSError."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def is_record_name(name: str) -> bool:
    """Whether a file may be a record: those being written begin with a dot."""
    return name.endswith(".json") and not name.startswith(".")


def read_json_object(path: Path) -> dict[str, object] | None:
    """Return the object in a JSON file, None for anything else."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file here, not a way to another folder."""
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def _parse_record(path: Path, entry: dict[str, object], file_names: set[str]) -> VideoRecord | None:
    config = get_object(entry, "config")
    is_failed = entry.get("status") == "failed"
    is_record = get_text(config, "task") or (
        entry.get("status") in ("done", "failed") and "name" in entry
    )
    if not is_record or not is_plain_name(get_text(entry, "name") or path.stem):
        return None
    settings = dict(_flatten_settings(config))
    size = re.fullmatch(r"(\d{1,5})[*xX×](\d{1,5})", get_text(settings, "size").strip())
    width, height = (int(size[1]), int(size[2])) if size else (None, None)
    job = get_object(entry, "job")
    return VideoRecord(
        path=path,
        name=path.stem,
        video=None if is_failed else _find_video(path, get_text(entry, "file"), file_names),
        status="failed" if is_failed else "done",
        error=get_first_line(get_text(entry, "error") or "no reason was kept")[:500]
        if is_failed
        else "",
        run=get_text(entry, "run"),
        rank=get_integer(entry, "rank"),
        job_source=f"{get_text(job, 'file')}, line {get_integer(job, 'line')}" if job else "",
        task=get_text(settings, "task"),
        prompt=get_text(entry, "prompt") or get_text(settings, "prompt"),
        seed=get_integer(settings, "seed")
        if get_integer(entry, "seed") is None
        else get_integer(entry, "seed"),
        width=get_integer(entry, "width") or width,
        height=get_integer(entry, "height") or height,
        num_frames=get_integer(entry, "num_frames") or get_integer(settings, "frame_num"),
        fps=get_integer(entry, "fps") or get_integer(settings, "fps"),
        began=get_timestamp(entry, "began"),
        seconds=get_number(entry, "seconds"),
        step_seconds=get_number(entry, "step_seconds"),
        tflops=get_number(entry, "tflops"),
        peak_gpu_gib=get_number(entry, "peak_gpu_gib"),
        peak_host_gib=get_number(entry, "peak_host_gib"),
        lossy_options=_list_lossy_options(entry, settings),
        digest=get_text(entry, "digest"),
        video_digest=get_text(entry, "video_digest"),
        machine=get_text(entry, "machine"),
        settings=settings,
        versions={
            key: get_text(get_object(entry, "versions"), key)
            for key in get_object(entry, "versions")
        },
        stages_by_rank=tuple(
            _parse_stage_numbers(stages)
            for stages in (entry.get("stages"), *get_list(entry, "other_ranks"))
        ),
        memory_by_stage=_parse_stage_numbers(entry.get("memory")),
    )


def _find_video(path: Path, recorded_name: str, file_names: set[str]) -> Path | None:
    """Return the result beside a record; of the name it is told by only the suffix counts."""
    suffixes = (".png", ".mp4") if recorded_name.endswith(".png") else (".mp4", ".png")
    for name in (path.stem + suffix for suffix in suffixes):
        video_path = path.with_name(name)
        if name in file_names and (
            not video_path.is_symlink() or video_path.resolve().parent == path.parent.resolve()
        ):
            return video_path
    return None


def _list_lossy_options(entry: dict[str, object], settings: dict[str, object]) -> tuple[str, ...]:
    if "distance" in entry:
        return tuple(
            get_text({"": item}, "")
            for item in get_list(entry, "distance")
            if isinstance(item, str)
        )
    return tuple(
        f"{key}={settings[key]}"
        for key, lossless_values in _LOSSLESS_VALUES.items()
        if key in settings and settings[key] not in lossless_values
    )


def _flatten_settings(
    config: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict) and prefix.count(".") < 8:
            yield from _flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", get_text({key: value}, key) if isinstance(value, str) else value


def _parse_stage_numbers(stage_entries: object) -> dict[str, dict[str, float]]:
    """Return the numbers of each stage."""
    numbers_by_stage = {}
    for stage, entry in (stage_entries if isinstance(stage_entries, dict) else {}).items():
        if isinstance(entry, dict):
            numbers_by_stage[stage] = {
                key: value for key in entry if (value := get_number(entry, key)) is not None
            }
    return numbers_by_stage
