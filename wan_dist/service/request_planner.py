"""Request planner: the checks and plan of a requested video, as those of a line of a job file; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_dist.config.overrides import HydraRequiredError, override_config
from wan_dist.config.schema import RunConfig
from wan_dist.config.sweep import is_sweep
from wan_dist.config.typed_settings import format_override
from wan_dist.jobs.job_file import Job
from wan_dist.jobs.planned_job import PlannedJob
from wan_dist.jobs.replicas import assign_degrees
from wan_dist.output.video_encoding import VideoEncoding
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.plan import make_plan, plan_memory
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.service.request_log import RequestLog, VideoRequest
from wan_dist.service.video_files import get_uploads_folder
from wan_dist.tasks.base import Task
from wan_dist.tasks.image_sizes import read_image_size
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
"""What the front needs beside the packages of a run."""
_ASSUMED_HOST_BYTES = 2**60
"""Host memory when a request is checked, in effect unlimited: a rank checks its own host."""


@dataclass(frozen=True)
class RequestPlanner:
    """Plans the videos of a service; can be pickled."""

    config: RunConfig
    """The service's, with the degrees of all axes."""
    arguments: tuple[str, ...]
    """Those of the service."""
    ranks: tuple[int, int]
    """Number of ranks in all, and on a node."""
    gpu_bytes: int | None
    """Memory of a rank's GPU; None on a CPU."""

    @property
    def output_folder(self) -> Path:
        """The folder of results."""
        return Path(self.config.output.dir).expanduser()

    @property
    def task(self) -> Task:
        """The task of all videos."""
        return get_task(self.config.task)

    def plan_defaults(self) -> PlannedJob:
        """Return the job of a video with the service's own settings, without prompt and images."""
        plan = make_plan(self.config, ranks=self.ranks, is_job=True, is_dry_run=True)
        return PlannedJob(Job(RequestLog(self.output_folder).path, 0, {}), self.config, plan)

    def plan_request(self, request: VideoRequest) -> PlannedJob:
        """Return the planned job of a request; raises InputError for what cannot be made."""
        uploads_folder = get_uploads_folder(self.output_folder)
        images = {key: str(uploads_folder / name) for key, name in request.images.items()}
        values = request.values | images | {"output.name": request.id}
        job = Job(RequestLog(self.output_folder).path, request.line, values)
        config = self._compose_config(job)
        plan = make_plan(config, ranks=self.ranks, is_job=True, image_size_reader=read_image_size)
        VideoEncoding.from_config(config.output).check()
        hardware = Hardware(self.gpu_bytes, _ASSUMED_HOST_BYTES)
        plan_memory(plan, hardware, self.task.model_dims)  # raises where nothing fits
        return PlannedJob(job, config, plan)

    def _compose_config(self, job: Job) -> RunConfig:
        settings = [(key, value, format_override(key, value)) for key, value in job.values.items()]
        try:
            return override_config(self.config, settings)
        except HydraRequiredError:  # or an error, which Hydra words
            config = read_config([*self.arguments, *job.overrides])
        assert config is not None
        return replace(config, parallel=self.config.parallel)


def make_request_planner(
    config: RunConfig, arguments: Sequence[str], *, ranks: tuple[int, int], gpu_bytes: int | None
) -> RequestPlanner:
    """Return the planner of a service; raises InputError for settings that no video could have.

    The ranks form replicas as for a file of many jobs like the service's own settings; see `assign_degrees`.
    """
    for key, is_given in (
        ("jobs", config.jobs is not None),
        ("latents", config.latents is not None),
        ("--multirun", is_sweep(arguments)),
    ):
        if is_given:
            raise InputError(f"{key} and serve.port are both given; a service takes requests")
    config.serve.check_access()
    if missing_packages := [name for name in _PACKAGES if find_spec(name) is None]:
        raise InputError(
            f"serve.port needs {' and '.join(missing_packages)}; install them with: "
            "pip install 'wan-dist[serve]'"
        )
    shared_arguments = tuple(
        argument for argument in arguments if argument.partition("=")[0] != "output.name"
    )
    config = replace(config, output=replace(config.output, name=None))
    configs = [config] * ranks[0]
    planner = RequestPlanner(
        assign_degrees(configs, *ranks, gpu_bytes, is_dry_run=True)[0],
        shared_arguments,
        ranks,
        gpu_bytes,
    )
    planner.plan_defaults()
    return planner


def describe_plan(plan: VideoPlan) -> dict[str, Any]:
    """Return the fields of a `VideoRequest` that follow from its plan."""
    num_steps = len(plan.sampling.schedule) * plan.num_clips
    return {
        "size": f"{plan.width}x{plan.height}",
        "num_frames": plan.num_frames,
        "fps": plan.fps,
        "num_steps": num_steps,
    }
