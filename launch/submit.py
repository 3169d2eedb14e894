"""Submit a video, or a file of them, to Slurm: the plan says what memory and time it takes.

    python -m launch submit cluster=h100 task=t2v-14B ckpt_dir=/shared/Wan2.1-T2V-14B prompt="Two cats, boxing on a stage"
    python -m launch submit cluster=h100 nodes=2 cluster.partition=gpu task=i2v-14B image=cat.jpg prompt="A cat on a surfboard" --dry-run
    python -m launch submit cluster=h100 nodes=2 jobs=prompts.txt output.dir=videos task=t2v-14B ckpt_dir=/shared/Wan2.1-T2V-14B
    python -m launch submit cluster=mine.yaml gpus=1 array=prompts.txt at_once=8 task=t2v-1.3B     # a job of Slurm's for each line
    python -m launch submit cluster=a100 fetch=/shared/Wan2.1-T2V-14B task=t2v-14B prompt=@prompt.txt     # a job before downloads

Keys are those of a run, and: cluster=NAME of conf/cluster/ or a YAML file, cluster.KEY=value for one of its settings, nodes=COUNT,
gpus=COUNT of a node, time=HH:MM:SS and mem=SIZE instead of what is computed, array=FILE of prompts (in .jsonl or .csv any settings),
at_once=COUNT of its jobs, fetch=FOLDER, after=JOB. --dry-run prints the script. Jobs are told to keep their state before their time is
up, go back into the queue, and go on. jobs=FILE makes all videos of a file in one job of Slurm's, whose ranks take the next one each and
load the models once; an array loads them for each, and begins as soon as one of its elements has a place.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.arguments import number_of, parted, path_of
from launch.slurm.cluster import ClusterConfig, cluster_of, minutes_of
from launch.slurm.run_time import seconds_of, step_seconds_of
from launch.slurm.sbatch import Request, clock, fetch_script, run_script
from wan_dist.config.schema import RunConfig
from wan_dist.jobs.job_file import configs_of, read_jobs
from wan_dist.planning.hardware import Hardware, parse_bytes
from wan_dist.planning.plan import Plan, arranged, make_plan
from wan_dist.run import check_jobs
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import image_size
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import configured

_KEYS = ("cluster", "nodes", "gpus", "time", "mem", "array", "at_once", "fetch", "after")
_GIB = 2**30


def main(arguments: list[str]) -> None:
    """Submit; raises InputError for what cannot be, before anything is submitted."""
    is_dry = "--dry-run" in arguments
    given, settings = parted([argument for argument in arguments if argument != "--dry-run"], _KEYS)
    changes = [setting.removeprefix("cluster.") for setting in settings if setting.startswith("cluster.")]
    settings = [setting for setting in settings if not setting.startswith("cluster.")]
    if "cluster" not in given:
        raise InputError("say what the nodes are like: cluster=h100, or a file of your own (--help has more)")
    cluster = cluster_of(given["cluster"], changes)
    python = "python" if cluster.setup else sys.executable
    fetching = ""
    if "fetch" in given:
        fetching = fetch_script(_what_to_fetch(given["fetch"], settings), cluster, python)
        settings = [*settings, f"ckpt_dir={given['fetch']}"]
    request = _request(given, settings, cluster, is_fetched=bool(fetching))
    if request is None:
        return
    if is_dry:
        script = run_script(replace(request, after="FETCH") if fetching else request, cluster, python)
        sys.stdout.write(f"{fetching}\n# and, once it is submitted as job FETCH:\n\n{script}" if fetching else script)
        return
    if fetching:
        _submit(run_script(request, cluster, python), "--test-only")  # it should not be refused once the download is on its way
        fetched = _submit(fetching)
        request = replace(request, after=f"{request.after}:{fetched}" if request.after else fetched)
        sys.stdout.write(f"job {fetched} downloads to {given['fetch']}: wan-fetch-{fetched}.log\n")
    job = _submit(run_script(request, cluster, python))
    sys.stdout.write("".join(f"{note}\n" for note in request.notes))
    sys.stdout.write(f"job {job}: wan-{job}{'-N' if request.is_array else ''}.log; squeue --job {job}\n")


def _request(given: dict[str, str], settings: list[str], cluster: ClusterConfig, *, is_fetched: bool) -> Request | None:
    """Return what to ask Slurm for; None after a flag that only prints."""
    nodes = number_of("nodes", given.get("nodes", "1"), "machines")
    gpus = number_of("gpus", given.get("gpus", str(cluster.gpus_per_node)), "GPUs")
    if gpus > cluster.gpus_per_node:
        raise InputError(f"gpus={gpus}: a node of cluster={given['cluster']} has {cluster.gpus_per_node}; nodes=COUNT takes several")
    elements = [settings]
    if "array" in given:
        jobs = read_jobs(path_of("array", given["array"]))
        elements = [[*settings, *job.settings] for job in jobs]
        configs = configs_of(jobs, settings, _configured)
        checked = [(_plan(config, cluster, nodes, gpus, f"{job.place}: "), config) for job, config in configs]
    elif (config := configured(settings)) is None:
        return None
    elif config.jobs is not None:
        told = check_jobs(config, settings, ranks=(nodes * gpus, gpus), gpu_bytes=_hardware(config, cluster).gpu_bytes)
        checked = [(_arranged(plan, own, cluster, f"{job.place}: "), own) for job, own, plan in told]
    else:
        checked = [(_plan(config, cluster, nodes, gpus), config)]
    plans = [plan for plan, _ in checked]
    first, config = checked[0]
    if config.ckpt_dir is not None and not is_fetched and not Path(config.ckpt_dir).expanduser().is_dir():
        folder = config.ckpt_dir
        sys.stderr.write(f"note: ckpt_dir={folder} is not a folder here; the nodes must see one, or fetch={folder} makes it\n")
    runs = [[each] for each in checked] if "array" in given else [checked]
    minutes = minutes_of(given["time"], "time") if "time" in given else max(_minutes_of(run, cluster) for run in runs)
    memory = parse_bytes(given["mem"], "mem") if "mem" in given else max(_memory_of(plan, cluster) for plan in plans)
    step = max(step_seconds_of(plan, cluster.tflops) for plan in plans)
    spread = f"{first.degrees.num_ranks} ranks, {first.degrees}; " if first.degrees.num_ranks > 1 else ""
    notes = [first.summary, spread + first.arrangement.words]
    count = f"{len(plans)} jobs, each: " if "array" in given else f"{len(plans)} videos: " if len(plans) > 1 else ""
    notes.append(count + f"{-(-memory // _GIB)} GiB of a node, up to {clock(minutes)}")
    return Request(
        name=f"wan-{first.task.name}",
        notes=notes,
        settings=elements,
        is_array="array" in given,
        at_once=number_of("at_once", given["at_once"], "jobs") if "at_once" in given else None,
        nodes=nodes,
        gpus_per_node=gpus,
        memory_gib=-(-memory // _GIB),
        minutes=minutes,
        signal_seconds=max(cluster.signal_seconds, 30 + int(1.5 * step)),
        after=given.get("after"),
    )


def _configured(settings: list[str]) -> RunConfig:
    config = configured(settings)
    if config is None:
        raise InputError("a flag that prints the configuration says nothing of several jobs; leave array=FILE out")
    return config


def _hardware(config: RunConfig, cluster: ClusterConfig) -> Hardware:
    gpu_bytes = parse_bytes(cluster.gpu_memory, "cluster.gpu_memory") if config.device != "cpu" else None
    return Hardware(gpu_bytes, parse_bytes(cluster.host_memory, "cluster.host_memory"), "cluster.host_memory")


def _plan(config: RunConfig, cluster: ClusterConfig, nodes: int, gpus: int, where: str = "") -> Plan:
    try:
        plan = make_plan(config, ranks=(nodes * gpus, gpus), size_of_image=image_size)
    except InputError as fault:
        raise InputError(f"{where}{fault}") from None
    return _arranged(plan, config, cluster, where)


def _arranged(plan: Plan, config: RunConfig, cluster: ClusterConfig, where: str) -> Plan:
    try:
        return arranged(plan, config, _hardware(config, cluster), get_task(config.task).models)
    except InputError as fault:
        raise InputError(f"{where}{fault}") from None


def _memory_of(plan: Plan, cluster: ClusterConfig) -> int:
    """Return the bytes to ask for: a fifth and 4 GiB more than planned, if nodes have them."""
    planned = max(use.host_bytes for use in plan.uses)
    return min(int(1.2 * planned) + 4 * _GIB, parse_bytes(cluster.host_memory, "cluster.host_memory"))


def _minutes_of(videos: Sequence[tuple[Plan, RunConfig]], cluster: ClusterConfig) -> int:
    """Return the minutes to ask for: half as much again as they should take, and five, in steps of five."""
    seconds = seconds_of([(plan, config.sample.steps) for plan, config in videos], cluster.tflops)
    wanted = 5 * math.ceil((1.5 * seconds / 60 + 5) / 5)
    return wanted if cluster.max_time is None else min(wanted, minutes_of(cluster.max_time, "cluster.max_time"))


def _what_to_fetch(folder: str, settings: list[str]) -> list[str]:
    keys = dict(setting.partition("=")[::2] for setting in settings)
    if "ckpt_dir" in keys:
        raise InputError(f"fetch={folder} is where the checkpoint comes to be; leave ckpt_dir={keys['ckpt_dir']} out")
    size = [f"size={keys['size']}"] if "size" in keys else []
    return [get_task(keys.get("task", "")).name, folder, *size]


def _submit(script: str, *options: str) -> str:
    """Submit a script and return the job's number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *options], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("there is no sbatch on this machine; --dry-run prints the script, to be submitted where there is one") from None
    if done.returncode:
        raise InputError(f"Slurm refuses it: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().partition(";")[0]
