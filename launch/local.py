"""Run on all GPUs of this machine: checks the settings, then starts torchrun.

    python -m launch local task=i2v-14B image=cat.jpg prompt="A cat on a surfboard"
    python -m launch local ranks=4 task=t2v-14B prompt=@prompt.txt size=832x480
    python -m launch local ranks=2 task=toy              # two processes on the CPU, where there is no GPU

Keys are those of a run, and: ranks=COUNT, by default one for each GPU. The command and the variables that it
sets are printed; variables that are set in the environment already are not changed.
"""

import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass

from launch.arguments import parse_count, split_arguments
from wan_dist.config.schema import RunConfig
from wan_dist.jobs.planned_job import has_jobs, plan_jobs
from wan_dist.planning.hardware import find_gpus
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.environment import ADDRESS_VARIABLES, RANK_VARIABLES
from wan_dist.service.request_planner import make_request_planner
from wan_dist.tasks.run_config import read_config

_NO_PEER_ACCESS = re.compile(r"GeForce RTX [45]0\d\d")
"""GPUs without peer-to-peer access to each other's memory, though some drivers report it.

NCCL then hangs, or the data that it sends arrives wrong.
"""
_FORWARDED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that torchrun forwards to its ranks."""
_LAUNCHER_STEP_KEYS = ("SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID")
"""Variables of a launcher that this process is part of; removed, since the new run is one of its own."""


def main(arguments: list[str]) -> None:
    """Replace this process by the run's command (execve).

    Raises InputError for invalid settings, before anything heavy starts.
    """
    start = prepare_start(arguments)
    if start is None:
        return
    sys.stderr.write(f"$ {start.command_line}\n")
    os.execve(start.command[0], start.command, start.environment)


@dataclass(frozen=True)
class RunStart:
    """A run on the GPUs of this machine, as it is started."""

    command: list[str]
    environment: dict[str, str]
    command_line: str
    """The same for a shell, with the variables that are set or removed."""


def prepare_start(arguments: list[str]) -> RunStart | None:
    """Check the settings and return how to start the run, None after a flag that only prints.

    Raises InputError for invalid settings.
    """
    options, settings = split_arguments(arguments, ("ranks",))
    gpus = find_gpus()
    num_ranks = len(gpus) or 1
    if "ranks" in options:
        num_ranks = parse_count("ranks", options["ranks"], "processes")
    config = read_config(settings)
    if config is None:
        return None
    _check_settings(
        config, settings, num_ranks, min((total_bytes for _, total_bytes, _ in gpus), default=None)
    )
    command = build_run_command(num_ranks, settings)
    removed_keys = [
        key
        for key in (*RANK_VARIABLES, *ADDRESS_VARIABLES, *_LAUNCHER_STEP_KEYS)
        if key in os.environ
    ]
    environment = {key: value for key, value in os.environ.items() if key not in removed_keys}
    variables = {
        key: value for key, value in choose_variables(num_ranks).items() if key not in environment
    }
    command_words = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
    if removed_keys:
        command_words = ["env", *(f"-u {key}" for key in removed_keys), *command_words]
    command_line = " ".join([*command_words, shlex.join(command)])
    return RunStart(command, environment | variables, command_line)


def _check_settings(
    config: RunConfig, settings: list[str], num_ranks: int, gpu_bytes: int | None
) -> None:
    """Raise InputError for what this many ranks, with GPUs of this memory, could not do."""
    ranks = (num_ranks, num_ranks)
    if config.serve.port is not None:
        make_request_planner(config, settings, ranks=ranks, gpu_bytes=gpu_bytes)
    elif has_jobs(config, settings):
        plan_jobs(config, settings, ranks=ranks, gpu_bytes=gpu_bytes)
    else:
        make_plan(config, ranks=ranks)


def build_run_command(num_ranks: int, settings: list[str]) -> list[str]:
    """Return the command of a run on ``num_ranks`` ranks; one rank needs no torchrun."""
    run_arguments = ["-m", "wan_dist.run", *settings]
    if num_ranks == 1:
        return [sys.executable, *run_arguments]
    rendezvous_options = [
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
    ]  # a free port; a host's name may not resolve
    return [
        sys.executable,
        "-m",
        "wan_dist.parallel.torchrun",
        "--nnodes=1",
        f"--nproc_per_node={num_ranks}",
        *rendezvous_options,
        *run_arguments,
    ]


def choose_variables(num_ranks: int) -> dict[str, str]:
    """Return the environment variables to set for ``num_ranks`` ranks on this machine."""
    num_threads = max(1, (os.cpu_count() or 1) // num_ranks)
    variables = {
        "OMP_NUM_THREADS": str(num_threads),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    if num_ranks > 1 and any(_NO_PEER_ACCESS.search(name) for name, _, _ in find_gpus()):
        variables["NCCL_P2P_DISABLE"] = "1"
    if num_ranks > 1:
        # By default torchrun handles signals that nohup and shells have it ignore, and is killed by SIGUSR1,
        # leaving its ranks behind.
        variables["PET_SIGNALS_TO_HANDLE"] = ",".join(
            name
            for name in _FORWARDED_SIGNALS
            if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
        )
    return variables
