"""A file of jobs -> the settings of each, checked and named; no torch."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.arguments import check_setting_key, is_text_key
from wan_dist.config.checks import check_prompt_length
from wan_dist.config.hydra_quoting import quote_if_needed, quote_text
from wan_dist.config.overrides import HydraRequiredError, is_plain_key, override_config
from wan_dist.config.schema import RunConfig
from wan_dist.jobs.job_entries import KEY_ALIASES, read_entries
from wan_dist.planning.file_names import slugify_prompt
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

_RUN_ONLY_KEYS = (
    "jobs",
    "retry_failed",
    "device",
    "parallel",
    "fsdp",
    "output.dir",
    "output.events",
)
_FILE_KEYS = ("image", "first_frame", "last_frame", "latents")


@dataclass(frozen=True)
class Job:
    """One line of a file of jobs."""

    file: Path
    line: int
    """From 1."""
    values: dict[str, object]
    """Settings of a run by key."""

    @property
    def location(self) -> str:
        """Where it is from."""
        return f"{self.file}, line {self.line}"

    def check_keys(self) -> None:
        """Raise InputError if it sets what jobs of one run share."""
        for key in self.values:
            if any(key == name or key.startswith(f"{name}.") for name in _RUN_ONLY_KEYS):
                raise InputError(
                    f"{self.location}: {key} is of the whole run; give it on the command line"
                )

    @property
    def overrides(self) -> list[str]:
        """What it sets, as on the command line."""
        return [_format_override(key, value) for key, value in self.values.items()]


def read_jobs(file: Path) -> list[Job]:
    """Return the jobs of a file, told apart by its suffix: a prompt a line, JSON objects, or a table with keys in its first row.

    Empty lines are left out, and those that are the same as others. Images and ``@file.txt`` are sought beside the file. Where a job
    gives no name, its results are named after its prompt and a digest of its settings, so that lines may be added before it. Raises
    InputError, with the line, for what cannot be read, and for names that are one where case or Unicode's forms do not count; keys and
    values are checked as they are used.
    """
    jobs = [
        Job(file, line, _resolve_entry(entry, file, line)) for line, entry in read_entries(file)
    ]
    if not jobs:
        raise InputError(
            f"{file} holds no jobs; it should have a prompt a line, or be .jsonl, .json or .csv"
        )
    jobs_by_result_name: dict[str, Job] = {}
    for job in jobs:
        same_name_job = jobs_by_result_name.setdefault(_normalize_result_name(job), job)
        if same_name_job.values != job.values:
            similar_name_text = f" ({_get_result_name(same_name_job)}) where a file system ignores case or Unicode forms; give it another name"
            raise InputError(
                f"{job.location}: output.name={_get_result_name(job)} is that of line {same_name_job.line}"
                + (
                    " too"
                    if _get_result_name(same_name_job) == _get_result_name(job)
                    else similar_name_text
                )
            )
    if len(jobs_by_result_name) < len(jobs):
        logger.info(
            "note      %s: lines that are the same as others, %d, are made once",
            file,
            len(jobs) - len(jobs_by_result_name),
        )
    return list(jobs_by_result_name.values())


def _get_result_name(job: Job) -> str:
    """Return a job's name as its results have it."""
    return str(job.values["output.name"]).removesuffix(".mp4").removesuffix(".png")


def _normalize_result_name(job: Job) -> str:
    """Return the same for all names that are one file somewhere: macOS and Windows ignore case, macOS how accents are encoded."""
    return unicodedata.normalize(
        "NFD", unicodedata.normalize("NFD", _get_result_name(job)).casefold()
    )


def compose_job_configs(
    jobs: Iterable[Job], overrides: Sequence[str], compose: Callable[[list[str]], RunConfig]
) -> Iterator[tuple[Job, RunConfig]]:
    """Return each job with its configuration: ``settings``, and over them its own. Raises InputError with the line.

    What jobs share is composed once, and for each choice of files of defaults (``task=``, ``memory=``) that jobs make.
    """
    config_by_choices: dict[tuple[str, ...], RunConfig | None] = {}
    for job in jobs:
        file_choices = tuple(
            _format_override(key, value)
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
    """Return the configuration of these settings; None where something is wrong with it, which a job's own settings may mend."""
    try:
        return compose(overrides)
    except InputError:
        return None


def _try_override_config(config: RunConfig | None, job: Job) -> RunConfig | None:
    """Return the configuration with a job's plain settings; None where only Hydra can say what comes of them."""
    if config is None:
        return None
    try:
        return override_config(
            config,
            [
                (key, value, _format_override(key, value))
                for key, value in job.values.items()
                if is_plain_key(key)
            ],
        )
    except HydraRequiredError:
        return None


def _resolve_entry(entry: dict[str, object], file: Path, line: int) -> dict[str, object]:
    """Return the entry with a name, and with files where they are."""
    entry = {KEY_ALIASES.get(key, key): value for key, value in entry.items()}
    resolved_entry = dict(entry)
    for key, value in entry.items():
        try:
            _check_setting(key, value)
        except InputError as error:
            raise InputError(f"{file}, line {line}: {error}") from None
        if isinstance(value, str) and key in _FILE_KEYS:
            resolved_entry[key] = _resolve_path(file, value)
        elif (
            isinstance(value, str)
            and key in ("prompt", "negative_prompt")
            and value.startswith("@")
            and not value.startswith("@@")
        ):
            resolved_entry[key] = f"@{_resolve_path(file, value[1:])}"
    if resolved_entry.get("output.name") is None:
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:8]
        resolved_entry["output.name"] = "-".join(
            part for part in (slugify_prompt(str(entry.get("prompt", ""))), digest) if part
        )
    return resolved_entry


def _resolve_path(file: Path, name: str) -> str:
    return name if name.startswith("~") else str(file.parent / name)


def _check_setting(key: str, value: object) -> None:
    """Raise InputError for what is no setting, or no value of one. A file of jobs holds data: nothing in it is computed."""
    if isinstance(value, dict):
        raise InputError(f"{key} is an object; write its keys with dots, as sample.steps")
    check_setting_key(key)
    if is_text_key(key):
        if isinstance(value, bool | list):
            raise InputError(f"{key}={json.dumps(value)} is not a text; write it in quotes")
        if key in ("prompt", "negative_prompt"):
            check_prompt_length(key, str(value))
    elif "${" in json.dumps(value):
        raise InputError(f"{key}={json.dumps(value)} has ${{ in it, and takes a value as it is")


def _format_override(key: str, value: object) -> str:
    """Return a setting as on the command line; text comes to be what it is here."""
    if value is None:
        return f"{key}=null"
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    needs_quotes = (
        is_text_key(key) and quote_if_needed(value) == value
    )  # such as text in quotes, and null
    return f"{key}={quote_text(value) if needs_quotes else value}"
