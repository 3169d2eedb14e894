"""Video records of a folder; files of other programs and broken records are skipped."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wan_dist.config.video_formats import RESULT_SUFFIXES
from wan_dist.output.json_values import get_integer, get_text
from wan_dist.output.record import DONE, FAILED, SourceEntry, VideoRecord
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
"""Prefixes of settings that do not change a video's frames, with the exception of memory.vae_dtype."""
_LOSSLESS_VALUES = {
    "quant": ("none",),
    "attention": ("auto", "fa4", "fa3", "fa2", "cudnn", "flash", "sdpa", "sdpa16"),
    "cache.steps": (None,),
}


@dataclass(frozen=True, kw_only=True)
class GalleryVideo:
    """A video of a folder, or one that failed, as its record says.

    Where the record lacks a value, numbers are None and texts empty.
    """

    path: Path
    """File of the record."""
    name: str
    """File name of the results, without suffix."""
    video: Path | None
    """The video or PNG beside the record, None if it is missing."""
    source: SourceEntry | None = None
    """Video that it was made from."""
    status: str
    """done or failed."""
    error: str
    run: str
    rank: int | None
    """First of the ranks that made the video."""
    job_source: str
    """Job file and line."""
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
    """TFLOP/s of each rank."""
    peak_gpu_gib: float | None
    peak_host_gib: float | None
    lossy_options: tuple[str, ...]
    """Settings in use that change the result beyond rounding errors, as quant=int8."""
    digest: str
    video_digest: str
    machine: str
    settings: Mapping[str, object] = field(repr=False)
    """All settings by dotted key."""
    versions: Mapping[str, str] = field(repr=False)
    stages_by_rank: tuple[Mapping[str, Mapping[str, float]], ...] = field(repr=False)
    """For each rank, by stage, seconds and GiB."""
    memory_by_stage: Mapping[str, Mapping[str, float]] = field(repr=False)
    """Planned and measured GiB of a rank, by stage."""

    @property
    def steps(self) -> int | None:
        """Denoising steps."""
        return get_integer(self.settings, "sample.steps")

    @property
    def peak_memory(self) -> tuple[float, str] | None:
        """Peak memory in GiB, and where: GPU or host."""
        if self.peak_gpu_gib is not None:
            return self.peak_gpu_gib, "GPU"
        return None if self.peak_host_gib is None else (self.peak_host_gib, "host")

    @cached_property
    def result_settings(self) -> dict[str, object]:
        """Settings that the frames depend on, by dotted key.

        They have the prompt as it was read from a file and the seed as it was drawn.
        """
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


RecordCache = dict[str, tuple[tuple[object, ...], GalleryVideo | None]]
"""Records by file name, each with the file state that shows whether it has changed."""


def read_records(folder: Path, record_cache: RecordCache | None = None) -> list[GalleryVideo]:
    """Return the records of a folder, sorted by run and name.

    Files that are no records, and records that name a file elsewhere, are skipped. Records in
    ``record_cache`` that have not changed are taken from it, and it is updated to all records of the folder.
    Raises InputError where there is no such folder.
    """
    try:
        file_names = list_file_names(folder)
    except OSError as fault:
        raise InputError(
            f"{folder} cannot be read: {fault.strerror}; give the folder of the videos"
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
                _make_gallery_video(folder / name, VideoRecord.from_json(entry), file_names),
            )
    previous_cache.clear()
    previous_cache.update(current_cache)
    records = [record for _, record in current_cache.values() if record is not None]
    return sorted(records, key=lambda record: (record.run, make_natural_key(record.name)))


def _read_file_state(path: Path, file_names: set[str]) -> tuple[object, ...]:
    """Return the state that a record depends on: that of its file, and which results are beside it."""
    try:
        file_stat = path.stat()
    except OSError:
        return ()
    return (
        file_stat.st_mtime_ns,
        file_stat.st_size,
        file_stat.st_ino,
        *(path.stem + suffix in file_names for suffix in RESULT_SUFFIXES),
    )


def list_file_names(folder: Path) -> set[str]:
    """Return the names of a folder's regular files: no folders, no pipes or devices; raises OSError."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def is_record_name(name: str) -> bool:
    """Whether a file may be a record; names of files that are being written begin with a dot."""
    return name.endswith(".json") and not name.startswith(".")


def read_json_object(path: Path) -> dict[str, object] | None:
    """Return the object in a JSON file, None for any other content."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the same folder, not a path to another."""
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def _make_gallery_video(
    path: Path, record: VideoRecord, file_names: set[str]
) -> GalleryVideo | None:
    """Return the video of a record, None if it is that of no video."""
    config, job = record.config or {}, record.job
    is_failed = record.status == FAILED
    is_record = get_text(config, "task") or (
        record.status in (DONE, FAILED) and record.name is not None
    )
    if not is_record or not is_plain_name(record.name or path.stem):
        return None
    settings = dict(_flatten_settings(config))
    size = re.fullmatch(r"(\d{1,5})[*xX×](\d{1,5})", get_text(settings, "size").strip())
    width, height = (int(size[1]), int(size[2])) if size else (None, None)
    error_text = get_first_line(record.error or "no reason was kept")[:500]
    return GalleryVideo(
        path=path,
        name=path.stem,
        video=None if is_failed else _find_video(path, record.file or "", file_names),
        source=record.source,
        status=FAILED if is_failed else DONE,
        error=error_text if is_failed else "",
        run=record.run or "",
        rank=record.rank,
        job_source=f"{job['file']}, line {job['line']}" if job else "",
        task=get_text(settings, "task"),
        prompt=record.prompt or get_text(settings, "prompt"),
        seed=get_integer(settings, "seed") if record.seed is None else record.seed,
        width=record.width or width,
        height=record.height or height,
        num_frames=record.num_frames or get_integer(settings, "frame_num"),
        fps=record.fps or get_integer(settings, "fps"),
        began=record.began,
        seconds=record.seconds,
        step_seconds=record.step_seconds,
        tflops=record.tflops,
        peak_gpu_gib=record.peak_gpu_gib,
        peak_host_gib=record.peak_host_gib,
        lossy_options=_list_lossy_options(record, settings),
        digest=record.digest or "",
        video_digest=record.video_digest or "",
        machine=record.machine or "",
        settings=settings,
        versions=record.versions or {},
        stages_by_rank=(record.stages or {}, *(record.other_ranks or ())),
        memory_by_stage=record.memory or {},
    )


def _find_video(path: Path, recorded_name: str, file_names: set[str]) -> Path | None:
    """Return the result beside a record, None if it is missing.

    Of the recorded name only the suffix is used.
    """
    suffixes = sorted(RESULT_SUFFIXES, key=lambda suffix: not recorded_name.endswith(suffix))
    for name in (path.stem + suffix for suffix in suffixes):
        video_path = path.with_name(name)
        if name in file_names and (
            not video_path.is_symlink() or video_path.resolve().parent == path.parent.resolve()
        ):
            return video_path
    return None


def _list_lossy_options(record: VideoRecord, settings: dict[str, object]) -> tuple[str, ...]:
    if record.distance is not None:
        return tuple(record.distance)
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


def make_natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key for natural sorting: job-2 before job-10."""
    parts: list[tuple[int, int, str]] = []
    digits = ""
    for character in f"{name}\0":
        if "0" <= character <= "9":
            digits += character
            continue
        if digits:
            parts.append((0, int(digits[:18]), digits))
            digits = ""
        parts.append((1, 0, character))
    return parts
