"""Planned jobs of a job file: checked, with plans, and sorted by model; imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wan_dist.config.recorded_settings import expand_recorded_settings
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import LOADING
from wan_dist.config.sweep import is_sweep
from wan_dist.jobs.job_file import Job, compose_job_configs, read_jobs
from wan_dist.jobs.replicas import assign_degrees
from wan_dist.jobs.sweep_jobs import make_sweep_jobs
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import read_image_size
from wan_dist.tasks.run_config import read_config


@dataclass(frozen=True)
class PlannedJob:
    """A job with its checked configuration and its plan."""

    source: Job
    config: RunConfig
    plan: VideoPlan
    """Without the images, which are read again when the job is made."""

    @property
    def name(self) -> str:
        """File name of the results, without suffix."""
        return self.plan.name

    @property
    def model_key(self) -> str:
        """Key of the models that the job needs: equal for jobs that can use the same loaded ones."""
        return repr(read_settings(self.config, LOADING))

    @property
    def video_shape(self) -> tuple[int, ...]:
        """Width, height and number of frames, which kernels may be compiled for."""
        return (self.plan.width, self.plan.height, self.plan.frame_num)

    def make_plan_with_images(self) -> VideoPlan:
        """Return the plan with its images, which are read here."""
        return make_plan(self.config, is_job=True) if self.plan.has_encoded_input else self.plan


def sort_by_model(jobs: Iterable[PlannedJob]) -> list[PlannedJob]:
    """Group jobs by model, and within a model by video shape; the sort is stable."""
    jobs_by_model: dict[str, dict[tuple[int, ...], list[PlannedJob]]] = {}
    for job in jobs:
        jobs_by_model.setdefault(job.model_key, {}).setdefault(job.video_shape, []).append(job)
    return [
        job
        for jobs_by_shape in jobs_by_model.values()
        for same_shape_jobs in jobs_by_shape.values()
        for job in same_shape_jobs
    ]


def has_jobs(config: RunConfig, arguments: Sequence[str]) -> bool:
    """Whether a run is of several videos: those of a job file, or of a sweep."""
    return config.jobs is not None or is_sweep(arguments)


def plan_jobs(
    config: RunConfig, arguments: list[str], *, ranks: tuple[int, int], gpu_bytes: int | None
) -> list[PlannedJob]:
    """Return the jobs of a run's file or sweep; raises InputError with the line of one that cannot be made.

    ``arguments`` are those of the run, ``ranks`` the numbers of ranks in all and on a node, ``gpu_bytes`` the
    memory of each rank's GPU. It is enough to call it on one rank: the result can be pickled, in about 1 kB a
    job, of which most is the prompt. Images are not decoded, and the size of one that jobs share is read
    once.
    """
    arguments = expand_recorded_settings(arguments)
    if config.jobs is None:
        jobs, shared_arguments = make_sweep_jobs(arguments)
    else:
        jobs, shared_arguments = read_jobs(Path(config.jobs).expanduser()), arguments
        for job in jobs:
            job.check_keys()
    shared_arguments = [
        argument
        for argument in shared_arguments
        if argument.partition("=")[0] not in ("jobs", "output.name")
    ]
    job_configs = [
        job_config
        for _, job_config in compose_job_configs(jobs, shared_arguments, _read_job_config)
    ]
    planned_jobs = []
    image_size_reader = cache(read_image_size)
    for job, job_config in zip(
        jobs, assign_degrees(job_configs, *ranks, gpu_bytes, image_size_reader), strict=True
    ):
        try:
            plan = make_plan(
                job_config, ranks=ranks, is_job=True, image_size_reader=image_size_reader
            )
            planned_jobs.append(PlannedJob(job, job_config, plan))
        except InputError as error:
            raise InputError(f"{job.location}: {error}") from None
    return planned_jobs


def _read_job_config(arguments: Sequence[str]) -> RunConfig:
    config = read_config(arguments)
    assert config is not None
    return config
