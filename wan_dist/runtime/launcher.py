"""Launcher integration: Slurm's variables become torchrun's, and ranks and torchrun end with each other.

Which launcher started a rank is read from the environment, see `environment.detect_launcher`.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from wan_dist.runtime.environment import detect_launcher, read_number_variable, read_text_variable
from wan_dist.runtime.errors import InputError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER_GRACE_SECONDS = 20.0
_parent_pid: int | None = None
"""The process that started this rank, set by `set_parent_death_signal`."""
_SHELL_NAMES = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish")

_KILL_LAUNCHER_SCRIPT = """
import os, signal, sys, time
launcher, patience = int(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + patience
while time.monotonic() < end:
    time.sleep(0.5)
    try:
        os.kill(launcher, 0)
    except OSError:
        sys.exit()
os.kill(launcher, signal.SIGKILL)
"""


def translate_slurm_variables() -> None:
    """Set torchrun's variables in a task that srun started: ranks, and the first host's address and port.

    The port is derived from the job and step, so that steps on the same host do not meet. An address or port
    that is set stays. Raises InputError for variables of Slurm that are incomplete, malformed, or contradict
    those that are set.
    """
    environ = os.environ
    num_tasks, tasks_per_node = (
        read_number_variable("SLURM_STEP_NUM_TASKS"),
        read_text_variable("SLURM_STEP_TASKS_PER_NODE"),
    )
    # torchrun has set them, or this is a script of sbatch, which is no task, or a shell without other tasks
    if read_text_variable("RANK") or num_tasks is None or not tasks_per_node or is_srun_pty_shell():
        return
    rank_variables = {
        "RANK": str(_read_slurm_number("SLURM_PROCID")),
        "LOCAL_RANK": str(_read_slurm_number("SLURM_LOCALID")),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_WORLD_SIZE": str(
            _count_tasks_on_node(tasks_per_node, read_number_variable("SLURM_NODEID") or 0)
        ),
    }
    for key, value in rank_variables.items():
        if environ.setdefault(key, value).strip() != value:
            raise InputError(
                f"{key}={environ[key]} in the environment, but srun has set {value}; "
                f"unset {key}, or start the ranks without srun"
            )
    job_id, step_id = (
        read_number_variable("SLURM_JOB_ID") or 0,
        read_number_variable("SLURM_STEP_ID") or 0,
    )
    environ.setdefault(
        "MASTER_ADDR",
        next(iter(expand_host_list(read_text_variable("SLURM_STEP_NODELIST"))), "localhost"),
    )
    environ.setdefault("MASTER_PORT", str(20000 + (job_id * 7 + step_id) % 12000))


def is_srun_pty_shell() -> bool:
    """Return whether this command was typed in a shell of ``srun --pty``, whose step has no other task left.

    srun gives a terminal to the first task and nothing to read to the others, so that their shells end at
    once. A shell that was given a script or a command runs it in every task, and does not count.
    """
    if (
        read_number_variable("SLURM_PROCID") != 0
        or not read_text_variable("SLURM_PTY_PORT")
        or not hasattr(os, "getsid")
    ):
        return False
    try:
        program, *options = (
            Path(f"/proc/{os.getsid(0)}/cmdline")
            .read_text(errors="replace")
            .rstrip("\0")
            .split("\0")
        )
    except OSError:
        return False
    is_interactive = all(
        re.fullmatch(r"--?[a-z-]+", option) and not re.fullmatch(r"-[a-z]*c[a-z]*", option)
        for option in options
    )
    return Path(program).name.lstrip("-") in _SHELL_NAMES and is_interactive


def _read_slurm_number(key: str) -> int:
    number = read_number_variable(key)
    if number is None:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS is set in the environment without {key}: "
            "start with srun, or unset SLURM_STEP_NUM_TASKS"
        )
    return number


def _count_tasks_on_node(task_counts: str, node_index: int) -> int:
    """Return the number of tasks of a node, from Slurm's list such as "2(x3),1"; raises InputError."""
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", task_counts, re.ASCII):
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE={task_counts} in the environment is not Slurm's list of counts, "
            "such as 2(x3),1"
        )
    last_node = -1
    for count, num_repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", task_counts):
        last_node += int(num_repeats or 1)
        if node_index <= last_node:
            return int(count)
    raise InputError(
        f"SLURM_NODEID={node_index} in the environment, "
        f"but SLURM_STEP_TASKS_PER_NODE={task_counts} has {last_node + 1} nodes"
    )


def expand_host_list(host_list: str) -> list[str]:
    """Return the host names of Slurm's list; raises InputError for other text.

    "gpu[003-004,9],login" gives gpu003, gpu004, gpu9 and login.
    """
    if host_list and not re.fullmatch(
        r"(?:[^\s\[\]]|\[\d{1,6}(?:[-,]\d{1,6})*\])+", host_list, re.ASCII
    ):
        raise InputError(
            f"SLURM_STEP_NODELIST={host_list} in the environment is not Slurm's list of hosts, "
            "such as gpu[003-004,9]"
        )
    return [
        host
        for part in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", host_list)
        for host in _expand_brackets(part)
    ]


def _expand_brackets(name: str) -> list[str]:
    prefix, opening_bracket, remainder = name.partition("[")
    if not opening_bracket:
        return [name]
    range_list, _, tail = remainder.partition("]")
    padded_numbers: list[str] = []
    for number_range in range_list.split(","):
        first, _, last = number_range.partition("-")
        padded_numbers += [
            str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)
        ]
    return [
        f"{prefix}{number}{expanded_tail}"
        for number in padded_numbers
        for expanded_tail in _expand_brackets(tail)
    ]


def set_parent_death_signal() -> None:
    """Have the kernel send SIGTERM to this rank when the process that started it dies.

    A torchrun that is killed does not end its ranks itself.
    """
    global _parent_pid
    _parent_pid = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def schedule_launcher_kill() -> None:
    """Have the torchrun of this failed rank killed if it does not end by itself, unless it may restart ranks.

    A torchrun that has lost the rendezvous host waits for it for 15 minutes, and ignores SIGTERM meanwhile.
    One that has died is not replaced by the process that has adopted its ranks.
    """
    can_restart = read_text_variable("TORCHELASTIC_RESTART_COUNT") != read_text_variable(
        "TORCHELASTIC_MAX_RESTARTS"
    )
    is_alive = os.getppid() == _parent_pid
    if detect_launcher() == "torchrun" and is_alive and not can_restart:
        command = [
            sys.executable,
            "-c",
            _KILL_LAUNCHER_SCRIPT,
            str(_parent_pid),
            str(_LAUNCHER_GRACE_SECONDS),
        ]
        subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
