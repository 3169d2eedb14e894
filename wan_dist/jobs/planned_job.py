"""Jobs of a file, checked and planned, in the order in which they are made; no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wan_dist.config.schema import RunConfig
from wan_dist.jobs.job_file import Job, compose_job_configs, read_jobs
from wan_dist.planning.plan import Plan, make_plan
from wan_dist.planning.replicas import assign_degrees
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import read_image_size
from wan_dist.tasks.run_config import read_config


@dataclass(frozen=True)
class PlannedJob:
    """A job that has been checked."""

    source: Job
    config: RunConfig
    plan: Plan
    """Without the images, which are read again when it is made."""

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return self.plan.name

    @property
    def model_key(self) -> str:
        """What the models depend on that are loaded for it."""
        config = self.config
        return repr(
            (
                config.task,
                config.ckpt_dir,
                config.dit_file,
                config.dtype,
                config.quant,
                config.attention,
                config.memory,
                config.fsdp,
            )
        )

    @property
    def video_shape(self) -> tuple[int, ...]:
        """What kernels may be compiled for."""
        return (self.plan.width, self.plan.height, self.plan.frame_num)

    def make_plan_with_images(self) -> Plan:
        """Return the plan with its images."""
        has_images = any(
            file is not None
            for file in (self.config.image, self.config.first_frame, self.config.last_frame)
        )
        return make_plan(self.config, is_job=True) if has_images else self.plan


def sort_by_model(jobs: Iterable[PlannedJob]) -> list[PlannedJob]:
    """Return jobs of the same models together, and among them those of the same shape, each in the order they are in."""
    jobs_by_model: dict[str, dict[tuple[int, ...], list[PlannedJob]]] = {}
    for job in jobs:
        jobs_by_model.setdefault(job.model_key, {}).setdefault(job.video_shape, []).append(job)
    return [
        job
        for jobs_by_shape in jobs_by_model.values()
        for same_shape_jobs in jobs_by_shape.values()
        for job in same_shape_jobs
    ]


def plan_jobs(
    config: RunConfig, arguments: list[str], *, ranks: tuple[int, int], gpu_bytes: int | None
) -> list[PlannedJob]:
    """Return the jobs of a run's file; raises InputError with the line of one that cannot be made.

    ``arguments`` are those of the run, ``ranks`` how many it has, and on a node, ``gpu_bytes`` the memory of each one's GPU. It is
    enough to call it on one rank: what it returns can be pickled, in about 1 kB a job, of which most is the prompt. Images are not
    decoded, and those that jobs share are looked at once.
    """
    assert config.jobs is not None
    jobs = read_jobs(Path(config.jobs).expanduser())
    for job in jobs:
        job.check_keys()
    shared_arguments = [
        argument
        for argument in arguments
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
