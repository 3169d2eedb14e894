"""Check this machine for all that a run needs, with advice for what is wrong.

    python -m launch doctor
    python -m launch doctor task=i2v-14B ckpt_dir=/models/I2V-14B   # also the checkpoint, and its memory
    torchrun --nproc_per_node=8 -m launch doctor                    # also all-to-all between the GPUs
    srun python -m launch doctor                                    # the same, on all nodes of a job

Keys are those of a run. Exit code 1 says that something would make runs fail.
"""

import sys
from functools import partial

from launch.doctor import gpus, machine, software
from launch.doctor.findings import FAULT, NOTE, OK, Finding, run_checks
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.runtime.launcher import translate_slurm_variables
from wan_dist.runtime.network import choose_network_interface
from wan_dist.tasks.run_config import read_config


def main(arguments: list[str]) -> int:
    """Print the findings and return the exit code; raises InputError for invalid settings."""
    translate_slurm_variables()
    ranks = read_rank_layout()
    config = read_config(arguments) if arguments else None
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
    has_several_ranks = ranks.num_ranks > 1
    findings: list[Finding] = []
    for finding in run_checks(checks if is_first_on_node else ()):
        findings.append(finding)
        if not has_several_ranks:
            _print_finding(finding)
    if not has_several_ranks:
        return _print_totals(findings)
    from launch.doctor.exchange import check_exchange  # imports torch, which takes seconds

    choose_network_interface()
    findings_by_host = check_exchange(findings)
    if ranks.rank == 0:
        for host_index, (host, host_findings) in enumerate(findings_by_host):
            for finding in host_findings:
                if host_index == 0 or finding.verdict != OK:
                    _print_finding(finding, host if host_index else "")
        return _print_totals(
            [finding for _, host_findings in findings_by_host for finding in host_findings]
        )
    # The first rank's code says it: torchrun would end that rank as soon as another has failed.
    return 0


def _print_finding(finding: Finding, host: str = "") -> None:
    sys.stdout.write("\n".join(finding.format_lines(host)) + "\n")
    sys.stdout.flush()


def _print_totals(findings: list[Finding]) -> int:
    num_faults, num_notes = (
        sum(finding.verdict == verdict for finding in findings) for verdict in (FAULT, NOTE)
    )
    sys.stdout.write(
        f"\n{num_faults or 'no'} fault{'' if num_faults == 1 else 's'}, "
        f"{num_notes or 'no'} note{'' if num_notes == 1 else 's'}\n"
    )
    return int(num_faults > 0)
