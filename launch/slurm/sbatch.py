"""Batch scripts for sbatch, from what a job requests."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.slurm.cluster import ClusterConfig

_RUN_COMMAND = """\
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --label \\
    %s -m wan_dist.run "${settings[@]}"
"""
REQUEUE_SCRIPT = r"""code=$?
mark=.wan-$SLURM_JOB_ID.requeued # what the last attempt has left, and how many in a row have left nothing new
if ((code == 75)); then          # ended early by a signal: the same job continues from the saved state
    folder=outputs name='' texts=${XDG_CACHE_HOME:-${HOME:-}/.cache}/wan-dist/prompts
    for setting in "${settings[@]}"; do
        case $setting in
        output.dir=*) folder=${setting#*=} ;;
        output.name=*) name=${setting#*=} ;;
        cache.dir=*) texts=${setting#*=} ;;
        esac
    done
    folder=${folder/#\~/${HOME:-}} texts=${texts/#\~/${HOME:-}} idle=0
    left=$({
        find "$folder" -maxdepth 1 -type f \( -name '*.mp4' -o -name '*.png' -o -name '*.json' \) -printf '%p %s\n' | grep -F "/$name"
        find "$folder" -maxdepth 1 -type f -name '*.state.safetensors' -exec cksum {} + | grep -F "/$name"
        find "$texts" -maxdepth 1 -type f -name '*.safetensors'
    } 2>/dev/null | sort | cksum)
    if read -r count before 2>/dev/null <"$mark" && [[ $left == "$before" ]]; then
        idle=$((count + 1))
    fi
    if ((idle < 2)); then
        echo "$idle $left" >"$mark"
        echo "goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit "$code"
    fi
    echo "not requeued: two requeues in a row left no new step, text or video in $folder; submit it again with more time" >&2
fi
rm -f "$mark"
exit "$code"
"""  # noqa: E501 as in slurm/requeue.sbatch, whose end it is
"""Shell code after the run: requeues a preempted job, unless two requeues in a row made no progress.

It reads the run's arguments from the array ``settings``.
"""


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """A job of Slurm's: the run's settings, and the resources that it needs."""

    name: str
    notes: Sequence[str]
    """Comments in the script, a line each."""
    settings: Sequence[Sequence[str]]
    """Settings of the run; of an array, those of each element."""
    is_array: bool = False
    max_running_jobs: int | None = None
    num_nodes: int
    gpus_per_node: int
    memory_gib: int
    time_limit_minutes: int
    signal_seconds: int
    """Seconds before its time limit at which it is told to save its state."""
    required_job: str | None = None
    """Number of the job that must have succeeded before."""


def build_run_script(request: SlurmRequest, cluster: ClusterConfig, python: str) -> str:
    """Return the script of a run, or of an array with a run for each element."""
    gpus_option = (
        f"{cluster.gpu_type}:{request.gpus_per_node}" if cluster.gpu_type else request.gpus_per_node
    )
    options = {
        "job-name": request.name,
        **_list_placement_options(cluster, cluster.partition),
        "nodes": request.num_nodes,
        "gpus-per-node": gpus_option,
        "ntasks-per-node": request.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_gpu,
        "mem": f"{request.memory_gib}G",
        "time": format_minutes(request.time_limit_minutes),
        "signal": f"USR1@{request.signal_seconds}",
        "open-mode": "append",
        "output": "wan-%A-%a.log" if request.is_array else "wan-%j.log",
    }
    if request.is_array:
        limit_text = f"%{request.max_running_jobs}" if request.max_running_jobs else ""
        options["array"] = f"0-{len(request.settings) - 1}{limit_text}"
    if request.required_job:
        options |= {"dependency": f"afterok:{request.required_job}", "kill-on-invalid-dep": "yes"}
    run_body = f"settings=({shlex.join(request.settings[0])})\n"
    if request.is_array:
        run_body = _format_array_settings(request.settings)
    return _assemble_script(
        request.notes,
        options,
        ["--requeue", *cluster.options],
        cluster,
        f"{run_body}\n{_RUN_COMMAND % shlex.quote(python)}{REQUEUE_SCRIPT}",
    )


def build_fetch_script(arguments: Sequence[str], cluster: ClusterConfig, python: str) -> str:
    """Return the script that downloads a task's checkpoint; ``arguments`` are those of ``launch fetch``."""
    options = {
        "job-name": "wan-fetch",
        **_list_placement_options(cluster, cluster.fetch_partition or cluster.partition),
        "ntasks": 1,
        "cpus-per-task": 4,
        "mem": "4G",
        "time": cluster.fetch_time,
        "output": "wan-fetch-%j.log",
    }
    return _assemble_script(
        [],
        options,
        [],
        cluster,
        f"{shlex.quote(python)} -m wan_dist fetch {shlex.join(arguments)}\n",
    )


def format_minutes(minutes: int) -> str:
    """Return minutes as Slurm writes them, e.g. 1-02:30:00."""
    days, remaining_minutes = divmod(minutes, 24 * 60)
    days_text = f"{days}-" if days else ""
    return f"{days_text}{remaining_minutes // 60:02}:{remaining_minutes % 60:02}:00"


def _list_placement_options(cluster: ClusterConfig, partition: str | None) -> dict[str, str]:
    placement = {
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    return {key: value for key, value in placement.items() if value is not None}


def _assemble_script(
    notes: Sequence[str],
    options: Mapping[str, object],
    extra_options: Sequence[str],
    cluster: ClusterConfig,
    body: str,
) -> str:
    lines = ["#!/bin/bash", *(f"# {note}" for note in notes)]
    lines += [f"#SBATCH --{key}={value}" for key, value in options.items()]
    lines += [f"#SBATCH {option}" for option in extra_options]
    lines += ["set -uo pipefail", "", *cluster.setup]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    return "\n".join(lines) + f"\n{body}"


def _format_array_settings(elements: Sequence[Sequence[str]]) -> str:
    cases = [
        f"{element_index}) settings=({shlex.join(settings)}) ;;"
        for element_index, settings in enumerate(elements)
    ]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", ""])
