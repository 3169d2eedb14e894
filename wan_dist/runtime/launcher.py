"""What a rank does about what started it: Slurm's variables become torchrun's, and neither the rank nor torchrun outlives the other."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from wan_dist.runtime.environment import launched_by, number_of, text_of
from wan_dist.runtime.errors import InputError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 20.0
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish")

_UNDERTAKER = """
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


def adopt_slurm() -> None:
    """Set what torchrun would set, in a task that srun started: rank, number of ranks, and the first host's address.

    The port is the job's and step's own. An address that is set stays. Raises InputError for variables of Slurm that are incomplete,
    malformed, or contradict those that are set.
    """
    given = os.environ
    num_tasks, on_nodes = number_of("SLURM_STEP_NUM_TASKS"), text_of("SLURM_STEP_TASKS_PER_NODE")
    if text_of("RANK") or num_tasks is None or not on_nodes or is_shell_of_srun():
        return  # torchrun's, or a script of sbatch, which is no task, or a shell in which nothing else runs
    found = {
        "RANK": str(_slurm_number("SLURM_PROCID")),
        "LOCAL_RANK": str(_slurm_number("SLURM_LOCALID")),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(on_nodes, number_of("SLURM_NODEID") or 0)),
    }
    for key, value in found.items():
        if given.setdefault(key, value).strip() != value:
            raise InputError(f"{key}={given[key]} in the environment, but srun says {value}; unset {key}, or start ranks otherwise")
    job, step = number_of("SLURM_JOB_ID") or 0, number_of("SLURM_STEP_ID") or 0
    given.setdefault("MASTER_ADDR", next(iter(hosts_of(text_of("SLURM_STEP_NODELIST"))), "localhost"))
    given.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 12000))


def is_shell_of_srun() -> bool:
    """Whether this is a command typed in the shell of ``srun --pty``: of a step's tasks only that shell goes on, the others' have ended.

    srun gives a terminal to the first task and nothing to read to the others, so that their shells end at once. A shell that was
    given a script or a command runs it in every task: that is none.
    """
    if number_of("SLURM_PROCID") != 0 or not text_of("SLURM_PTY_PORT") or not hasattr(os, "getsid"):
        return False
    try:
        program, *options = Path(f"/proc/{os.getsid(0)}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return False
    is_plain = all(re.fullmatch(r"--?[a-z-]+", option) and not re.fullmatch(r"-[a-z]*c[a-z]*", option) for option in options)
    return Path(program).name.lstrip("-") in _SHELLS and is_plain


def _slurm_number(key: str) -> int:
    number = number_of(key)
    if number is None:
        raise InputError(f"SLURM_STEP_NUM_TASKS is set in the environment without {key}: start with srun, or unset SLURM_STEP_NUM_TASKS")
    return number


def _tasks_on_node(text: str, node: int) -> int:
    """Return how many tasks a node has, by Slurm's list such as "2(x3),1"; raises InputError."""
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", text, re.ASCII):
        raise InputError(f"SLURM_STEP_TASKS_PER_NODE={text} in the environment is not Slurm's list of counts, such as 2(x3),1")
    last = -1
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        last += int(times or 1)
        if node <= last:
            return int(count)
    raise InputError(f"SLURM_NODEID={node} in the environment, but SLURM_STEP_TASKS_PER_NODE={text} has {last + 1} nodes")


def hosts_of(nodes: str) -> list[str]:
    """Return the hosts of Slurm's list, e.g. gpu003, gpu004, gpu9 and login of "gpu[003-004,9],login"; raises InputError for other text."""
    if nodes and not re.fullmatch(r"(?:[^\s\[\]]|\[\d{1,6}(?:[-,]\d{1,6})*\])+", nodes, re.ASCII):
        raise InputError(f"SLURM_STEP_NODELIST={nodes} in the environment is not Slurm's list of hosts, such as gpu[003-004,9]")
    return [host for part in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodes) for host in _expand(part)]


def _expand(name: str) -> list[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    numbers, _, after = rest.partition("]")
    found: list[str] = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{end}" for number in found for end in _expand(after)]


def die_with_launcher() -> None:
    """Have the kernel end this rank when torchrun dies; a torchrun that is killed does not end its ranks itself."""
    if launched_by() == "torchrun" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def bury_launcher() -> None:
    """After this rank has failed: see that its torchrun ends too, unless it may start the ranks again.

    A torchrun that has lost the rendezvous host waits for it for 15 minutes, deaf to SIGTERM.
    """
    may_restart = text_of("TORCHELASTIC_RESTART_COUNT") != text_of("TORCHELASTIC_MAX_RESTARTS")
    if launched_by() == "torchrun" and not may_restart:
        command = [sys.executable, "-c", _UNDERTAKER, str(os.getppid()), str(_PATIENCE)]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
