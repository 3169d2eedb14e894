"""Submit a video, or a file of them, to Slurm, with the memory and time that the plan says.

    python -m launch submit cluster=h100 task=t2v-14B ckpt_dir=/shared/T2V-14B prompt="Two cats, boxing"
    python -m launch submit cluster=h100 nodes=2 cluster.partition=gpu task=i2v-14B image=cat.jpg --dry-run
    python -m launch submit cluster=h100 nodes=2 jobs=prompts.txt output.dir=videos task=t2v-14B
    python -m launch submit cluster=mine.yaml gpus=1 array=prompts.txt at_once=8 task=t2v-1.3B
    python -m launch submit cluster=a100 fetch=/shared/T2V-14B task=t2v-14B prompt=@prompt.txt

Keys are those of a run, and: cluster=NAME of conf/cluster/ or a YAML file, cluster.KEY=value for one of its
settings, nodes=COUNT, gpus=COUNT of a node, time=HH:MM:SS and mem=SIZE instead of what is computed,
array=FILE of prompts (in .jsonl or .csv any settings) for a job of Slurm's for each line, at_once=COUNT of
them, fetch=FOLDER for a job before that downloads the checkpoint, after=JOB. --dry-run prints the script.

Jobs are told to save their state before their time limit, are requeued, and resume. jobs=FILE makes all
videos of a file in one job of Slurm's, whose ranks take the next one each and load the models once; so does
--multirun seed=1,2,3 with all combinations of a sweep. An array (array=FILE, or array=sweep with --multirun)
loads them for each video, and starts as soon as one of its elements can be placed.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.arguments import expand_user_path, parse_count, split_arguments
from launch.slurm.cluster import ClusterConfig, load_cluster, parse_minutes
from launch.slurm.run_time import estimate_run_seconds, estimate_step_seconds
from launch.slurm.sbatch import SlurmRequest, build_fetch_script, build_run_script, format_minutes
from wan_dist.config.schema import RunConfig
from wan_dist.config.sweep import is_sweep
from wan_dist.jobs.job_file import compose_job_configs, read_jobs
from wan_dist.jobs.planned_job import has_jobs, plan_jobs
from wan_dist.jobs.sweep_jobs import make_sweep_jobs
from wan_dist.planning.hardware import Hardware, parse_bytes
from wan_dist.planning.plan import RunPlan, make_plan, plan_memory
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import read_image_size
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

_SUBMIT_KEYS = ("cluster", "nodes", "gpus", "time", "mem", "array", "at_once", "fetch", "after")
_GIB = 2**30
_SWEEP = "sweep"
"""As array=sweep: an element for each combination of a sweep's settings."""

_PlannedVideo = tuple[RunPlan, RunConfig]


def main(arguments: list[str]) -> None:
    """Submit the job; raises InputError for invalid settings before anything is submitted."""
    is_dry_run = "--dry-run" in arguments
    options, settings = split_arguments(
        [argument for argument in arguments if argument != "--dry-run"], _SUBMIT_KEYS
    )
    cluster_changes = [
        setting.removeprefix("cluster.") for setting in settings if setting.startswith("cluster.")
    ]
    settings = [setting for setting in settings if not setting.startswith("cluster.")]
    if "cluster" not in options:
        raise InputError(
            "cluster is missing; describe the nodes, e.g. cluster=h100, or a file of your own (see --help)"
        )
    cluster = load_cluster(options["cluster"], cluster_changes)
    python = "python" if cluster.setup else sys.executable
    fetch_job_script = ""
    if "fetch" in options:
        fetch_job_script = build_fetch_script(
            _build_fetch_arguments(options["fetch"], settings), cluster, python
        )
        settings = [*settings, f"ckpt_dir={options['fetch']}"]
    request = _build_request(options, settings, cluster, is_fetched=bool(fetch_job_script))
    if request is None:
        return
    if is_dry_run:
        if fetch_job_script:
            request = _require_job(request, "FETCH")
            sys.stdout.write(f"{fetch_job_script}\n# and, once it is submitted as job FETCH:\n\n")
        sys.stdout.write(build_run_script(request, cluster, python))
        return
    if fetch_job_script:
        # A job that Slurm refuses should be refused before the download is on its way.
        _submit_script(build_run_script(request, cluster, python), "--test-only")
        fetch_job = _submit_script(fetch_job_script)
        request = _require_job(request, fetch_job)
        sys.stdout.write(
            f"job {fetch_job} downloads to {options['fetch']}: wan-fetch-{fetch_job}.log\n"
        )
    run_job = _submit_script(build_run_script(request, cluster, python))
    sys.stdout.write("".join(f"{note}\n" for note in request.notes))
    log_suffix = "-N" if request.is_array else ""
    sys.stdout.write(f"job {run_job}: wan-{run_job}{log_suffix}.log; squeue --job {run_job}\n")


def _require_job(request: SlurmRequest, job: str) -> SlurmRequest:
    """Return the request with one more job of Slurm's that must have ended well before it."""
    required_jobs = [required for required in (request.required_job, job) if required]
    return replace(request, required_job=":".join(required_jobs))


def _build_request(
    options: dict[str, str], settings: list[str], cluster: ClusterConfig, *, is_fetched: bool
) -> SlurmRequest | None:
    """Return what to request of Slurm; None after a flag that only prints."""
    num_nodes, gpus_per_node = _parse_node_counts(options, cluster)
    is_array = "array" in options
    settings_by_element = [settings]
    videos: list[_PlannedVideo] | None
    if is_array:
        settings_by_element, videos = _plan_array(
            options["array"], settings, cluster, num_nodes, gpus_per_node
        )
    else:
        videos = _plan_run(settings, cluster, num_nodes, gpus_per_node)
    if videos is None:
        return None
    plans = [plan for plan, _ in videos]
    first_plan, first_config = videos[0]
    if not is_fetched:
        _warn_missing_checkpoint(first_config)
    videos_by_job = [[video] for video in videos] if is_array else [videos]
    if "time" in options:
        minutes = parse_minutes(options["time"], "time")
    else:
        minutes = max(_estimate_requested_minutes(job, cluster) for job in videos_by_job)
    if "mem" in options:
        memory_bytes = parse_bytes(options["mem"], "mem")
    else:
        memory_bytes = max(_estimate_requested_bytes(plan, cluster) for plan in plans)
    memory_gib = -(-memory_bytes // _GIB)
    max_running_jobs = None
    if "at_once" in options:
        max_running_jobs = parse_count("at_once", options["at_once"], "jobs")
    step_seconds = max(estimate_step_seconds(plan, cluster.tflops) for plan in plans)
    return SlurmRequest(
        name=f"wan-{first_plan.task.name}",
        notes=_format_notes(plans, memory_gib, minutes, is_array=is_array),
        settings=settings_by_element,
        is_array=is_array,
        max_running_jobs=max_running_jobs,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        memory_gib=memory_gib,
        time_limit_minutes=minutes,
        signal_seconds=max(cluster.signal_seconds, 30 + int(1.5 * step_seconds)),
        required_job=options.get("after"),
    )


def _parse_node_counts(options: dict[str, str], cluster: ClusterConfig) -> tuple[int, int]:
    """Return the number of nodes, and of GPUs of each."""
    num_nodes = parse_count("nodes", options.get("nodes", "1"), "machines")
    gpus_per_node = parse_count("gpus", options.get("gpus", str(cluster.gpus_per_node)), "GPUs")
    if gpus_per_node > cluster.gpus_per_node:
        raise InputError(
            f"gpus={gpus_per_node}: a node of cluster={options['cluster']} has "
            f"{cluster.gpus_per_node}; use nodes=COUNT for several nodes"
        )
    return num_nodes, gpus_per_node


def _plan_array(
    file_text: str, settings: list[str], cluster: ClusterConfig, num_nodes: int, gpus_per_node: int
) -> tuple[list[list[str]], list[_PlannedVideo]]:
    """Return the settings and the plan of each element of array=FILE, or of a sweep with array=sweep."""
    if is_sweep(settings) != (file_text == _SWEEP):
        raise InputError(
            f"array={file_text}: array={_SWEEP} and --multirun belong together; "
            "--multirun alone is one job"
        )
    if file_text == _SWEEP:
        jobs, settings = make_sweep_jobs(settings)
    else:
        jobs = read_jobs(expand_user_path("array", file_text))
    configs = compose_job_configs(jobs, settings, _read_job_config)
    videos = [
        (_plan_video(config, cluster, num_nodes, gpus_per_node, f"{job.location}: "), config)
        for job, config in configs
    ]
    return [[*settings, *job.overrides] for job in jobs], videos


def _plan_run(
    settings: list[str], cluster: ClusterConfig, num_nodes: int, gpus_per_node: int
) -> list[_PlannedVideo] | None:
    """Return the plans of one run, of several videos with jobs=FILE; None after a flag that only prints."""
    config = read_config(settings)
    if config is None:
        return None
    if not has_jobs(config, settings):
        return [(_plan_video(config, cluster, num_nodes, gpus_per_node), config)]
    planned_jobs = plan_jobs(
        config,
        settings,
        ranks=(num_nodes * gpus_per_node, gpus_per_node),
        gpu_bytes=_build_hardware(config, cluster).gpu_bytes,
    )
    return [
        (_arrange_plan(job.plan, job.config, cluster, f"{job.source.location}: "), job.config)
        for job in planned_jobs
    ]


def _warn_missing_checkpoint(config: RunConfig) -> None:
    """Print a note if the checkpoint's folder is not on this machine; the nodes may see it."""
    folder = config.ckpt_dir
    if folder is not None and not Path(folder).expanduser().is_dir():
        sys.stderr.write(
            f"note: ckpt_dir={folder} is no folder on this machine; "
            f"the nodes must have it, or use fetch={folder}\n"
        )


def _format_notes(
    plans: Sequence[RunPlan], memory_gib: int, minutes: int, *, is_array: bool
) -> list[str]:
    """Return lines that say what is made, how, and what is requested."""
    first_plan = plans[0]
    ranks_text, count_text = "", ""
    if first_plan.degrees.num_ranks > 1:
        ranks_text = f"{first_plan.degrees.num_ranks} ranks, {first_plan.degrees}; "
    if is_array:
        count_text = f"{len(plans)} jobs, each: "
    elif len(plans) > 1:
        count_text = f"{len(plans)} videos: "
    return [
        first_plan.summary,
        *first_plan.notes,
        ranks_text + first_plan.arrangement.description,
        f"{count_text}{memory_gib} GiB of a node, up to {format_minutes(minutes)}",
    ]


def _read_job_config(settings: list[str]) -> RunConfig:
    config = read_config(settings)
    if config is None:
        raise InputError(
            "a flag that prints the configuration cannot be combined with array=FILE; leave one of them out"
        )
    return config


def _build_hardware(config: RunConfig, cluster: ClusterConfig) -> Hardware:
    gpu_bytes = None
    if config.device != "cpu":
        gpu_bytes = parse_bytes(cluster.gpu_memory, "cluster.gpu_memory")
    host_bytes = parse_bytes(cluster.host_memory, "cluster.host_memory")
    return Hardware(gpu_bytes, host_bytes, "cluster.host_memory")


def _plan_video(
    config: RunConfig,
    cluster: ClusterConfig,
    num_nodes: int,
    gpus_per_node: int,
    error_prefix: str = "",
) -> RunPlan:
    try:
        plan = make_plan(
            config,
            ranks=(num_nodes * gpus_per_node, gpus_per_node),
            image_size_reader=read_image_size,
        )
    except InputError as error:
        raise InputError(f"{error_prefix}{error}") from None
    return _arrange_plan(plan, config, cluster, error_prefix)


def _arrange_plan(
    plan: VideoPlan, config: RunConfig, cluster: ClusterConfig, error_prefix: str
) -> RunPlan:
    try:
        return plan_memory(plan, _build_hardware(config, cluster), get_task(config.task).model_dims)
    except InputError as error:
        raise InputError(f"{error_prefix}{error}") from None


def _estimate_requested_bytes(plan: RunPlan, cluster: ClusterConfig) -> int:
    """Return the bytes to request: a fifth and 4 GiB more than planned, if nodes have them."""
    planned_bytes = max(stage_memory.host_bytes for stage_memory in plan.stage_memories)
    return min(
        int(1.2 * planned_bytes) + 4 * _GIB, parse_bytes(cluster.host_memory, "cluster.host_memory")
    )


def _estimate_requested_minutes(videos: Sequence[_PlannedVideo], cluster: ClusterConfig) -> int:
    """Return the minutes to request: 1.5 times the estimate and five, rounded up to a multiple of five."""
    seconds = estimate_run_seconds(
        [(plan, config.sample.steps) for plan, config in videos], cluster.tflops
    )
    minutes = 5 * math.ceil((1.5 * seconds / 60 + 5) / 5)
    if cluster.max_time is None:
        return minutes
    return min(minutes, parse_minutes(cluster.max_time, "cluster.max_time"))


def _build_fetch_arguments(folder: str, settings: list[str]) -> list[str]:
    values_by_key = dict(setting.partition("=")[::2] for setting in settings)
    if "ckpt_dir" in values_by_key:
        raise InputError(
            f"fetch={folder} is the folder of the checkpoint; "
            f"leave ckpt_dir={values_by_key['ckpt_dir']} out"
        )
    size_arguments = [f"size={values_by_key['size']}"] if "size" in values_by_key else []
    return [get_task(values_by_key.get("task", "")).name, folder, *size_arguments]


def _submit_script(script: str, *options: str) -> str:
    """Submit a script with sbatch and return the job's number; raises InputError."""
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise InputError(
            "no sbatch found on this machine; --dry-run prints the script, to submit elsewhere"
        ) from None
    if result.returncode:
        raise InputError(f"sbatch failed: {result.stderr.strip() or result.returncode}")
    return result.stdout.strip().partition(";")[0]
