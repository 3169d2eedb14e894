"""Check this machine for all that a run needs, with advice for what is wrong.

    python -m launch doctor
    python -m launch doctor task=i2v-14B ckpt_dir=/models/Wan2.1-I2V-14B-480P    # also the checkpoint, and whether it fits
    torchrun --nproc_per_node=8 -m launch doctor                                 # also what GPUs send to each other, and how fast
    srun python -m launch doctor                                                 # the same, on all nodes of a job

Keys are those of a run. Exit code 1 says that something would make runs fail.
"""

import sys
from functools import partial

from launch.doctor import gpus, machine, software
from launch.doctor.findings import FAULT, NOTE, OK, Finding, examine
from wan_dist.runtime.environment import read_ranks
from wan_dist.runtime.launcher import adopt_slurm
from wan_dist.runtime.network import choose_network
from wan_dist.tasks.run_config import configured


def main(arguments: list[str]) -> int:
    """Print what was found and return the exit code; raises InputError for settings that are wrong."""
    adopt_slurm()
    ranks = read_ranks()
    config = configured(arguments) if arguments else None
    if arguments and config is None:
        return 0
    is_first_on_node = ranks.local_rank == 0
    checks = [
        ("system", machine.check_system),
        ("GPUs", gpus.check_gpus),
        ("processes", gpus.check_processes),
        ("host memory", machine.check_host_memory),
        ("limits", machine.check_limits),
        ("variables", machine.check_variables),
        ("network", machine.check_network),
        ("torch", software.check_torch),
        ("packages", software.check_packages),
        ("attention", software.check_attention),
        ("ffmpeg", software.check_ffmpeg),
    ]
    if config is not None:
        checks.append(("task", partial(software.check_task, config)))
    several_ranks = ranks.num_ranks > 1
    found: list[Finding] = []
    for finding in examine(checks if is_first_on_node else ()):
        found.append(finding)
        if not several_ranks:
            _print(finding)
    if not several_ranks:
        return _end(found)
    from launch.doctor.exchange import check_exchange  # it imports torch, which takes seconds

    choose_network()
    by_host = check_exchange(found)
    if ranks.rank == 0:
        for number, (host, theirs) in enumerate(by_host):
            for finding in theirs:
                if number == 0 or finding.verdict != OK:
                    _print(finding, host if number else "")
        return _end([finding for _, theirs in by_host for finding in theirs])
    return 0  # the first rank's code says it: torchrun would end that one as soon as another has failed


def _print(finding: Finding, where: str = "") -> None:
    sys.stdout.write("\n".join(finding.lines(where)) + "\n")
    sys.stdout.flush()


def _end(found: list[Finding]) -> int:
    faults, notes = (sum(finding.verdict == verdict for finding in found) for verdict in (FAULT, NOTE))
    sys.stdout.write(f"\n{faults or 'no'} fault{'' if faults == 1 else 's'}, {notes or 'no'} note{'' if notes == 1 else 's'}\n")
    return int(faults > 0)
