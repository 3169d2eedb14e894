"""What a rank does about what started it: Slurm's variables become torchrun's, and neither the rank nor torchrun outlives the other."""

import ctypes
import os
import re
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 20.0

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

    The port is the job's and step's own. What is set already stays.
    """
    given = os.environ
    if "RANK" in given or "SLURM_STEP_NUM_TASKS" not in given or "SLURM_STEP_TASKS_PER_NODE" not in given:
        return  # torchrun's, or a script of sbatch, which is no task
    on_nodes = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or 1))
    ]
    job, step = int(given.get("SLURM_JOB_ID", "0")), int(given.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": given["SLURM_PROCID"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(on_nodes[int(given.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": next(iter(hosts_of(given.get("SLURM_STEP_NODELIST", ""))), "localhost"),
        "MASTER_PORT": str(20000 + (job * 7 + step) % 12000),
    }
    for key, value in found.items():
        given.setdefault(key, value)


def hosts_of(nodes: str) -> list[str]:
    """Return the hosts of Slurm's list, e.g. gpu003, gpu004, gpu9 and login of "gpu[003-004,9],login"."""
    return [host for part in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodes) for host in _expand(part)]


def _expand(name: str) -> list[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    numbers, _, after = rest.partition("]")
    found = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{end}" for number in found for end in _expand(after)]


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Have the kernel end this rank when torchrun dies; a torchrun that is killed does not end its ranks itself."""
    if _launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def bury_launcher() -> None:
    """After this rank has failed: see that its torchrun ends too, unless it may start the ranks again.

    A torchrun that has lost the rendezvous host waits for it for 15 minutes, deaf to SIGTERM.
    """
    may_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if _launched() and not may_restart:
        command = [sys.executable, "-c", _UNDERTAKER, str(os.getppid()), str(_PATIENCE)]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
