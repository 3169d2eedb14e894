"""A file of jobs -> the settings of each: a prompt a line, or JSON objects, or a table; no torch."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_dist.arguments import is_text, quote, quoted
from wan_dist.config import RunConfig
from wan_dist.errors import InputError

ALIASES = {
    "name": "output.name",
    "steps": "sample.steps",
    "solver": "sample.solver",
    "shift": "sample.shift",
    "guide_scale": "sample.guide_scale",
    "frames": "frame_num",
}
"""Short names that keys have in a file of jobs."""
_OF_THE_RUN = ("jobs", "retry_failed", "device", "parallel", "fsdp", "output.dir", "output.events")
_FILES = ("image", "first_frame", "last_frame", "latents")
_PLAIN = {"prompt": str, "negative_prompt": str, "image": str, "first_frame": str, "last_frame": str, "seed": int, "output.name": str}
"""Keys that change nothing else, and the types of their values: their jobs share what Hydra composes, which takes a while."""


@dataclass(frozen=True)
class Job:
    """One line of a file of jobs."""

    file: Path
    line: int
    """From 1."""
    values: dict[str, object]
    """Settings of a run by key."""

    @property
    def place(self) -> str:
        """Where it is from."""
        return f"{self.file}, line {self.line}"

    def check_keys(self) -> None:
        """Raise InputError if it sets what jobs of one run share."""
        for key in self.values:
            if any(key == name or key.startswith(f"{name}.") for name in _OF_THE_RUN):
                raise InputError(f"{self.place}: {key} is of the whole run; give it on the command line")

    @property
    def settings(self) -> list[str]:
        """What it sets, as on the command line."""
        return [_setting(key, value) for key, value in self.values.items()]


def read_jobs(file: Path) -> list[Job]:
    """Return the jobs of a file: of .jsonl an object of settings a line, of .csv a row, with keys in the first, of others a prompt a line.

    Empty lines are left out. Images and ``@file.txt`` are sought beside the file. Where a job gives no name, its results are named
    after its prompt and a digest of its settings, so that lines may be added before it. Raises InputError, with the line, for what
    cannot be read; keys and values are checked as they are used.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        why = getattr(fault, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{file} cannot be read as a file of jobs: {why}") from None
    read = {".jsonl": _objects, ".csv": _rows}.get(file.suffix.lower(), _prompts)
    jobs = [Job(file, line, _settled(entry, file, line)) for line, entry in read(text, file)]
    if not jobs:
        raise InputError(f"{file} holds no jobs; it should have a prompt a line, or be .jsonl or .csv")
    before: dict[object, Job] = {}
    for job in jobs:
        if (other := before.setdefault(job.values["output.name"], job)) is not job:
            if job.values == other.values:
                raise InputError(f"{job.place}: the same as line {other.line}; leave one out, or give it a name or seed of its own")
            raise InputError(f"{job.place}: output.name={job.values['output.name']} is that of line {other.line} too")
    return jobs


def configs_of(jobs: Iterable[Job], settings: Sequence[str], compose: Callable[[list[str]], RunConfig]) -> Iterator[tuple[Job, RunConfig]]:
    """Return each job with its configuration: ``settings``, and over them its own. Raises InputError with the line."""
    composed: dict[tuple[str, ...], RunConfig] = {}
    for job in jobs:
        plain: dict[str, Any] = {key: value for key, value in job.values.items() if type(value) is _PLAIN.get(key)}
        rest = tuple(_setting(key, value) for key, value in job.values.items() if key not in plain)
        try:
            if rest not in composed:
                composed[rest] = compose([*settings, *rest])
            config = composed[rest]
            output = replace(config.output, name=plain.pop("output.name")) if "output.name" in plain else config.output
            config = replace(config, output=output, **plain)
        except InputError as fault:
            raise InputError(f"{job.place}: {fault}") from None
        yield job, config


def _prompts(text: str, file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _objects(text: str, file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{file}, line {number}: not JSON ({fault})") from None
        if not isinstance(entry, dict):
            raise InputError(f'{file}, line {number}: not an object of settings, such as {{"prompt": "two cats boxing", "seed": 7}}')
        yield number, entry


def _rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        keys = [key.strip() for key in next(reader, [])]
        while True:
            number = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if not any(row):
                continue
            if len(row) != len(keys):
                raise InputError(f"{file}, line {number}: {len(row)} values for the {len(keys)} keys of the first line")
            cells = {key: value for key, value in zip(keys, row, strict=True) if value}
            yield number, {key: int(value) if key == "seed" and value.isdecimal() else value for key, value in cells.items()}
    except csv.Error as fault:
        raise InputError(f"{file}, line {reader.line_num}: not a table ({fault})") from None


def _settled(entry: dict[str, object], file: Path, line: int) -> dict[str, object]:
    """Return the entry with a name, and with files where they are."""
    entry = {ALIASES.get(key, key): value for key, value in entry.items()}
    found = dict(entry)
    for key, value in entry.items():
        if isinstance(value, dict):
            raise InputError(f"{file}, line {line}: {key} is an object; write its keys with dots, as sample.steps")
        if isinstance(value, str) and key in _FILES:
            found[key] = str(file.parent / Path(value).expanduser())
        elif isinstance(value, str) and key in ("prompt", "negative_prompt") and value.startswith("@"):
            found[key] = f"@{file.parent / Path(value[1:]).expanduser()}"
    if "output.name" not in found:
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:8]
        found["output.name"] = "-".join(part for part in (words_of(str(entry.get("prompt", ""))), digest) if part)
    return found


def words_of(prompt: str) -> str:
    """Return the beginning of a prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40].strip("-")


def _setting(key: str, value: object) -> str:
    """Return a setting as on the command line; text comes to be what it is here."""
    if value is None:
        return f"{key}=null"
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    is_read_otherwise = is_text(key) and quote(value) == value  # such as text in quotes, and null
    return f"{key}={quoted(value) if is_read_otherwise else value}"
