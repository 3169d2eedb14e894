"""Jobs of a sweep: one for each combination of its settings, like the lines of a job file; no torch."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from wan_dist.config.sweep import parse_sweep
from wan_dist.jobs.job_file import Job, is_run_only_key
from wan_dist.planning.file_names import slugify_prompt
from wan_dist.runtime.errors import InputError

_MAX_VALUES_CHARACTERS = 80
"""In a file name, for the values of a job."""


def make_sweep_jobs(arguments: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Return the jobs of a sweep, and the settings that they share.

    A job is named after its prompt, its own values, and a digest of all settings that its result depends on:
    the same sweep resumes, and other sweeps may use the same folder. Raises InputError for what cannot be
    swept.
    """
    sweep = parse_sweep(arguments)
    for key in sweep.combinations[0]:
        if is_run_only_key(key):
            raise InputError(f"--multirun: {key} applies to the whole run and takes one value")
    jobs = []
    for number, combination in enumerate(sweep.combinations, start=1):
        values: dict[str, object] = {
            key: None if value == "null" else value for key, value in combination.items()
        }
        values["output.name"] = _name_job(combination, sweep.shared_settings)
        jobs.append(Job(Path("--multirun"), number, values))
    return jobs, sweep.shared_settings


def _name_job(combination: dict[str, str], shared_settings: Sequence[str]) -> str:
    shared = dict(setting.partition("=")[::2] for setting in shared_settings)
    prefix = shared.pop("output.name", "") or slugify_prompt(shared.get("prompt", ""))
    depended_on = {key: value for key, value in shared.items() if not is_run_only_key(key)}
    digest = hashlib.sha256(json.dumps(depended_on | combination, sort_keys=True).encode())
    values = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in combination.items())
    plain_values = re.sub(r"[^\w.+-]+", "-", values)[:_MAX_VALUES_CHARACTERS].strip("-.")
    return "_".join(part for part in (prefix, plain_values, digest.hexdigest()[:6]) if part)
