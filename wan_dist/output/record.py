"""Record of a video, in a JSON file beside it: its fields, and how they are written and read; no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypedDict

from wan_dist.output.json_values import (
    get_integer,
    get_list,
    get_number,
    get_object,
    get_text,
    get_texts,
    get_timestamp,
    json_field,
)
from wan_dist.runtime.atomic_write import atomic_write

DONE, FAILED = "done", "failed"

Stages = dict[str, dict[str, float]]
"""Numbers by stage: seconds and GiB."""


class JobPosition(TypedDict):
    """Where a job was given."""

    file: str
    line: int | None


class LoraEntry(TypedDict):
    """A LoRA that was added to the weights."""

    file: str
    bytes: int | None
    sha256: str
    strength: float | None
    expert: str | None
    """high or low: the noise whose expert it was added to; None: every transformer."""


class SourceEntry(TypedDict):
    """A video that the result was made from, frame by frame."""

    setting: str
    """The setting that names it."""
    file: str
    """Its absolute path."""
    sha256: str


def _get_texts_by_name(entry: Mapping[str, object], key: str) -> dict[str, str]:
    texts = get_object(entry, key)
    return {name: get_text(texts, name) for name in texts}


def _get_integers_by_name(entry: Mapping[str, object], key: str) -> dict[str, int]:
    numbers = get_object(entry, key)
    return {name: value for name in numbers if (value := get_integer(numbers, name)) is not None}


def _get_stages(entry: Mapping[str, object], key: str) -> Stages:
    return _parse_stages(entry.get(key))


def _get_stages_of_ranks(entry: Mapping[str, object], key: str) -> list[Stages]:
    return [_parse_stages(stages) for stages in get_list(entry, key)]


def _get_job_position(entry: Mapping[str, object], key: str) -> JobPosition | None:
    job = get_object(entry, key)
    return {"file": get_text(job, "file"), "line": get_integer(job, "line")} if job else None


def _get_loras(entry: Mapping[str, object], key: str) -> list[LoraEntry]:
    loras = [lora for lora in get_list(entry, key) if isinstance(lora, dict)]
    return [
        {
            "file": get_text(lora, "file"),
            "bytes": get_integer(lora, "bytes"),
            "sha256": get_text(lora, "sha256"),
            "strength": get_number(lora, "strength"),
            "expert": get_text(lora, "expert") or None,
        }
        for lora in loras
    ]


def _get_source(entry: Mapping[str, object], key: str) -> SourceEntry | None:
    source = get_object(entry, key)
    setting, file, digest = (get_text(source, name) for name in ("setting", "file", "sha256"))
    if not setting or not file or not re.fullmatch(r"[0-9a-f]{64}", digest):
        return None
    return {"setting": setting, "file": file, "sha256": digest}


def _parse_stages(stage_entries: object) -> Stages:
    """Return the numbers of each stage; what is no number or no stage is left out."""
    numbers_by_stage = {}
    for stage, entry in (stage_entries if isinstance(stage_entries, dict) else {}).items():
        if isinstance(entry, dict):
            numbers_by_stage[stage] = {
                key: value for key in entry if (value := get_number(entry, key)) is not None
            }
    return numbers_by_stage


@dataclass(init=False)
class VideoRecord:
    """Record of a video, or of one that failed.

    A field that is not set is None, and absent from the file. The file has the fields in the order in which
    they were first set.
    """

    config: dict[str, Any] | None = json_field(get_object)
    """All settings, in sections."""
    versions: dict[str, str] | None = json_field(_get_texts_by_name)
    device: str | None = json_field(get_text)
    machine: str | None = json_field(get_text)
    began: float | None = json_field(get_timestamp)
    """Seconds since the epoch."""
    format: int | None = json_field(get_integer)
    """FORMAT_VERSION of the program that wrote it."""
    name: str | None = json_field(get_text)
    """File name of the results, without suffix."""
    prompt: str | None = json_field(get_text)
    seed: int | None = json_field(get_integer)
    width: int | None = json_field(get_integer)
    height: int | None = json_field(get_integer)
    num_frames: int | None = json_field(get_integer)
    num_clips: int | None = json_field(get_integer)
    """Clips of the video, if there are several; their stages are named STAGE clip2 and so on."""
    fps: int | None = json_field(get_integer)
    source: SourceEntry | None = json_field(_get_source)
    """Not set where there is none, or it cannot be read any more."""
    distance: list[str] | None = json_field(get_texts)
    """Settings in use that change the result beyond rounding errors, as quant=int8."""
    run: str | None = json_field(get_text)
    job: JobPosition | None = json_field(_get_job_position)
    rank: int | None = json_field(get_integer)
    """First of the ranks that made the video."""
    checkpoint: str | None = json_field(get_text)
    loras: list[LoraEntry] | None = json_field(_get_loras)
    """In the order in which they were added; not set without any."""
    degrees: dict[str, int] | None = json_field(_get_integers_by_name)
    """Degrees of parallelism by axis."""
    attention: str | None = json_field(get_text)
    """Kernel in use."""
    ran_out: list[str] | None = json_field(get_texts)
    """Stages that ran out of memory and used a fallback."""
    stepped_down_to: dict[str, Any] | None = json_field(get_object)
    """Arrangement used since memory ran out."""
    guessed_steps: int | None = json_field(get_integer)
    """Steps that the step cache guessed."""
    status: str | None = json_field(get_text)
    """DONE or FAILED."""
    error: str | None = json_field(get_text)
    file: str | None = json_field(get_text)
    """Path of the result when it was written."""
    arrangement: dict[str, Any] | None = json_field(get_object)
    step_seconds: float | None = json_field(get_number)
    tflops: float | None = json_field(get_number)
    """TFLOP/s of each rank."""
    digest: str | None = json_field(get_text)
    latents_digest: str | None = json_field(get_text)
    video_digest: str | None = json_field(get_text)
    """Hash of the result file."""
    memory: Stages | None = json_field(_get_stages)
    """Planned and measured GiB of a rank, by stage."""
    stages: Stages | None = json_field(_get_stages)
    other_ranks: list[Stages] | None = json_field(_get_stages_of_ranks)
    """Stages of each of the other ranks, before the video is decoded."""
    seconds: float | None = json_field(get_number)
    peak_host_gib: float | None = json_field(get_number)
    peak_gpu_gib: float | None = json_field(get_number)

    @classmethod
    def from_json(cls, content: object) -> Self:
        """Return the record in the content of a JSON file, without fields where it is none.

        A field whose value is of another type is None, or empty where it is a text, list or object. Entries
        that are no fields are left out.
        """
        entry = content if isinstance(content, dict) else {}
        readers = {item.name: item.metadata["read_value"] for item in fields(cls)}
        record = cls()
        for key in entry:
            if key in readers:
                setattr(record, key, readers[key](entry, key))
        return record

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return dict(vars(self))

    def write(self, path: Path) -> None:
        """Write the record; raises OSError."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        with atomic_write(path) as temporary_file:
            temporary_file.write_text(text + "\n", encoding="utf-8")
