"""A file of jobs -> the settings of each, checked and named; no torch."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.arguments import check_key, is_text, quote, quoted
from wan_dist.config.overrides import UnplainError, is_plain_key, override_config
from wan_dist.config.schema import RunConfig, check_length
from wan_dist.jobs.job_entries import ALIASES, read_entries
from wan_dist.planning.file_names import words_of
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

_OF_THE_RUN = ("jobs", "retry_failed", "device", "parallel", "fsdp", "output.dir", "output.events")
_FILES = ("image", "first_frame", "last_frame", "latents")


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
    """Return the jobs of a file, told apart by its suffix: a prompt a line, JSON objects, or a table with keys in its first row.

    Empty lines are left out, and those that are the same as others. Images and ``@file.txt`` are sought beside the file. Where a job
    gives no name, its results are named after its prompt and a digest of its settings, so that lines may be added before it. Raises
    InputError, with the line, for what cannot be read, and for names that are one where case or Unicode's forms do not count; keys and
    values are checked as they are used.
    """
    jobs = [Job(file, line, _settled(entry, file, line)) for line, entry in read_entries(file)]
    if not jobs:
        raise InputError(f"{file} holds no jobs; it should have a prompt a line, or be .jsonl, .json or .csv")
    found: dict[str, Job] = {}
    for job in jobs:
        other = found.setdefault(_file_of(job), job)
        if other.values != job.values:
            is_like = f" ({_name_of(other)}) where a file system ignores case or Unicode forms; give it another name"
            raise InputError(
                f"{job.place}: output.name={_name_of(job)} is that of line {other.line}"
                + (" too" if _name_of(other) == _name_of(job) else is_like)
            )
    if len(found) < len(jobs):
        logger.info("note      %s: lines that are the same as others, %d, are made once", file, len(jobs) - len(found))
    return list(found.values())


def _name_of(job: Job) -> str:
    """Return a job's name as its results have it."""
    return str(job.values["output.name"]).removesuffix(".mp4").removesuffix(".png")


def _file_of(job: Job) -> str:
    """Return the same for all names that are one file somewhere: macOS and Windows ignore case, macOS how accents are encoded."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", _name_of(job)).casefold())


def configs_of(jobs: Iterable[Job], settings: Sequence[str], compose: Callable[[list[str]], RunConfig]) -> Iterator[tuple[Job, RunConfig]]:
    """Return each job with its configuration: ``settings``, and over them its own. Raises InputError with the line.

    What jobs share is composed once, and for each choice of files of defaults (``task=``, ``memory=``) that jobs make.
    """
    composed: dict[tuple[str, ...], RunConfig | None] = {}
    for job in jobs:
        chosen = tuple(_setting(key, value) for key, value in job.values.items() if not is_plain_key(key))
        try:
            if chosen not in composed:
                composed[chosen] = _composed(compose, [*settings, *chosen])
            config = _overridden(composed[chosen], job)
            if config is None:
                config = compose([*settings, *job.settings])
        except InputError as fault:
            raise InputError(f"{job.place}: {fault}") from None
        yield job, config


def _composed(compose: Callable[[list[str]], RunConfig], settings: list[str]) -> RunConfig | None:
    """Return the configuration of these settings; None where something is wrong with it, which a job's own settings may mend."""
    try:
        return compose(settings)
    except InputError:
        return None


def _overridden(config: RunConfig | None, job: Job) -> RunConfig | None:
    """Return the configuration with a job's plain settings; None where only Hydra can say what comes of them."""
    if config is None:
        return None
    try:
        return override_config(config, [(key, value, _setting(key, value)) for key, value in job.values.items() if is_plain_key(key)])
    except UnplainError:
        return None


def _settled(entry: dict[str, object], file: Path, line: int) -> dict[str, object]:
    """Return the entry with a name, and with files where they are."""
    entry = {ALIASES.get(key, key): value for key, value in entry.items()}
    found = dict(entry)
    for key, value in entry.items():
        try:
            _check(key, value)
        except InputError as fault:
            raise InputError(f"{file}, line {line}: {fault}") from None
        if isinstance(value, str) and key in _FILES:
            found[key] = _beside(file, value)
        elif isinstance(value, str) and key in ("prompt", "negative_prompt") and value.startswith("@") and not value.startswith("@@"):
            found[key] = f"@{_beside(file, value[1:])}"
    if found.get("output.name") is None:
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:8]
        found["output.name"] = "-".join(part for part in (words_of(str(entry.get("prompt", ""))), digest) if part)
    return found


def _beside(file: Path, name: str) -> str:
    return name if name.startswith("~") else str(file.parent / name)


def _check(key: str, value: object) -> None:
    """Raise InputError for what is no setting, or no value of one. A file of jobs holds data: nothing in it is computed."""
    if isinstance(value, dict):
        raise InputError(f"{key} is an object; write its keys with dots, as sample.steps")
    check_key(key)
    if is_text(key):
        if isinstance(value, bool | list):
            raise InputError(f"{key}={json.dumps(value)} is not a text; write it in quotes")
        if key in ("prompt", "negative_prompt"):
            check_length(key, str(value))
    elif "${" in json.dumps(value):
        raise InputError(f"{key}={json.dumps(value)} has ${{ in it, and takes a value as it is")


def _setting(key: str, value: object) -> str:
    """Return a setting as on the command line; text comes to be what it is here."""
    if value is None:
        return f"{key}=null"
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    is_read_otherwise = is_text(key) and quote(value) == value  # such as text in quotes, and null
    return f"{key}={quoted(value) if is_read_otherwise else value}"
