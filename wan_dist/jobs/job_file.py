"""Job file reader: the settings of each job, checked and named; imports no torch."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.overrides import HydraRequiredError, is_plain_key, override_config
from wan_dist.config.paths import resolve_setting
from wan_dist.config.schema import RunConfig
from wan_dist.config.typed_settings import check_setting, format_override
from wan_dist.config.video_formats import remove_result_suffix
from wan_dist.jobs.job_entries import KEY_ALIASES, read_entries
from wan_dist.planning.file_names import slugify_prompt
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.tasks.animate import FOLDER_KEY
from wan_dist.tasks.camera import MOTIONS
from wan_dist.tasks.input_files import INPUT_KEYS

_RUN_ONLY_KEYS = (
    "jobs",
    "retry_failed",
    "device",
    "parallel",
    "fsdp",
    "output.dir",
    "output.events",
    "serve",
)
_FILE_KEYS = (*INPUT_KEYS, FOLDER_KEY, "camera", "latents", "output.audio")
"""Settings that name a file, relative to the job file; so do those of `FILE_LIST_KEYS`, also several."""


def is_run_only_key(key: str) -> bool:
    """Whether a setting, or its whole section, is shared by all jobs of a run."""
    return any(key == name or key.startswith(f"{name}.") for name in _RUN_ONLY_KEYS)


@dataclass(frozen=True)
class Job:
    """One entry of a job file."""

    file: Path
    line: int
    """Line number, from 1."""
    values: dict[str, object]
    """Settings by key."""

    @property
    def location(self) -> str:
        """File and line, for messages."""
        return f"{self.file}, line {self.line}"

    def check_keys(self) -> None:
        """Raise InputError if the job has a setting that all jobs of a run share."""
        for key in self.values:
            if is_run_only_key(key):
                raise InputError(
                    f"{self.location}: {key} applies to the whole run; give it on the command line"
                )

    @property
    def overrides(self) -> list[str]:
        """The settings, as on the command line."""
        return [format_override(key, value) for key, value in self.values.items()]


def read_jobs(file: Path) -> list[Job]:
    """Return the jobs of a file: one prompt a line, JSON objects, or a table with keys in its first row.

    The suffix says which. Empty lines and duplicate lines are left out. Paths of images and ``@file.txt`` are
    relative to the file. A job without a name is named after its prompt and a digest of its settings, so that
    lines may be added before it. Raises InputError, with the line, for what cannot be read, and for names
    that are equal where a file system ignores case or Unicode forms; keys and values are checked as they are
    used.
    """
    jobs = [
        Job(file, line, _resolve_entry(entry, file, line)) for line, entry in read_entries(file)
    ]
    if not jobs:
        raise InputError(
            f"{file} has no jobs; write one prompt per line, or use .jsonl, .json, .csv or .tsv"
        )
    jobs_by_result_name: dict[str, Job] = {}
    for job in jobs:
        same_name_job = jobs_by_result_name.setdefault(_normalize_result_name(job), job)
        if same_name_job.values != job.values:
            raise InputError(_format_name_conflict(job, same_name_job))
    if len(jobs_by_result_name) < len(jobs):
        logger.info(
            "note      %s: %d lines are duplicates, which are run once",
            file,
            len(jobs) - len(jobs_by_result_name),
        )
    return list(jobs_by_result_name.values())


def _format_name_conflict(job: Job, other_job: Job) -> str:
    """Return the error message for two different jobs whose results would have the same name."""
    name, other_name = _get_result_name(job), _get_result_name(other_job)
    message = f"{job.location}: output.name={name} is that of line {other_job.line}"
    if name == other_name:
        return f"{message} too"
    return (
        f"{message} ({other_name}) where a file system ignores case or Unicode forms; "
        "give it another name"
    )


def _get_result_name(job: Job) -> str:
    """Return the name of a job's results, without suffix."""
    return remove_result_suffix(str(job.values["output.name"]))


def _normalize_result_name(job: Job) -> str:
    """Return a key that is equal for names that are the same file on some file system.

    macOS and Windows ignore case, and macOS also how accents are encoded.
    """
    return unicodedata.normalize(
        "NFD", unicodedata.normalize("NFD", _get_result_name(job)).casefold()
    )


def compose_job_configs(
    jobs: Iterable[Job], overrides: Sequence[str], compose: Callable[[list[str]], RunConfig]
) -> Iterator[tuple[Job, RunConfig]]:
    """Yield each job with its configuration: ``overrides``, and over them its own settings.

    Composing takes Hydra about 100 ms, so the shared part is composed once for each combination of config
    groups (``task=``, ``memory=``) that jobs choose. Raises InputError with the line.
    """
    config_by_choices: dict[tuple[str, ...], RunConfig | None] = {}
    for job in jobs:
        file_choices = tuple(
            format_override(key, value)
            for key, value in job.values.items()
            if not is_plain_key(key)
        )
        try:
            if file_choices not in config_by_choices:
                config_by_choices[file_choices] = _try_compose_config(
                    compose, [*overrides, *file_choices]
                )
            config = _try_override_config(config_by_choices[file_choices], job)
            if config is None:
                config = compose([*overrides, *job.overrides])
        except InputError as error:
            raise InputError(f"{job.location}: {error}") from None
        yield job, config


def _try_compose_config(
    compose: Callable[[list[str]], RunConfig], overrides: list[str]
) -> RunConfig | None:
    """Return the configuration of these settings; None for an invalid one, which a job's own may correct."""
    try:
        return compose(overrides)
    except InputError:
        return None


def _try_override_config(config: RunConfig | None, job: Job) -> RunConfig | None:
    """Return the configuration with a job's plain settings; None where it takes Hydra to compose them."""
    if config is None:
        return None
    try:
        return override_config(
            config,
            [
                (key, value, format_override(key, value))
                for key, value in job.values.items()
                if is_plain_key(key)
            ],
        )
    except HydraRequiredError:
        return None


def _resolve_entry(entry: dict[str, object], file: Path, line: int) -> dict[str, object]:
    """Return the entry with full keys, a name, and file paths relative to the job file's folder resolved."""
    entry = {KEY_ALIASES.get(key, key): value for key, value in entry.items()}
    resolved_entry = dict(entry)
    for key, value in entry.items():
        try:
            check_setting(key, value)
        except InputError as error:
            raise InputError(f"{file}, line {line}: {error}") from None
        is_motion = key == "camera" and str(value) in MOTIONS
        resolved_entry[key] = (
            value if is_motion else resolve_setting(file.parent, key, value, _FILE_KEYS)
        )
    if resolved_entry.get("output.name") is None:
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:8]
        resolved_entry["output.name"] = "-".join(
            part for part in (slugify_prompt(str(entry.get("prompt", ""))), digest) if part
        )
    return resolved_entry
