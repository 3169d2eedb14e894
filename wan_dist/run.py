"""The command: ``python -m wan_dist.run task=... prompt=...``. Exit codes: 0 done, 1 the run failed, 2 bad input, 75 asked to end early."""

from wan_dist.runtime.signals import CODE, Preempted, end_when_asked, heed_signals, preemption

if __name__ == "__main__":
    end_when_asked()  # before the imports below, which take a second

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wan_dist.config.schema import RunConfig, leaf_fields
from wan_dist.jobs.job_file import Job, configs_of, read_jobs
from wan_dist.planning.plan import Plan, make_plan
from wan_dist.planning.rank_facts import check_alike, find_facts
from wan_dist.planning.replicas import spread
from wan_dist.runtime.cache_folders import is_writable, settle_caches
from wan_dist.runtime.environment import Ranks, read_ranks, settle_environment, text_of
from wan_dist.runtime.errors import InputError, told
from wan_dist.runtime.launcher import adopt_slurm, bury_launcher, die_with_launcher, is_shell_of_srun
from wan_dist.runtime.log import logger, open_log, protect_streams
from wan_dist.runtime.network import choose_network
from wan_dist.tasks.image_sizes import image_size
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.run_config import configured

if TYPE_CHECKING:
    from wan_dist.parallel.team import Team

_JOIN_SECONDS = 600.0
"""In which all ranks have to come, where the settings do not say."""

EXAMPLES = """\
  python -m wan_dist.run task=toy
  python -m wan_dist.run task=t2v-1.3B prompt="Two cats, boxing on a stage" seed=7
  python -m wan_dist.run task=t2v-14B ckpt_dir=/models/Wan2.1-T2V-14B prompt=@prompt.txt size=832*480 sample.steps=30
  python -m wan_dist.run task=t2v-1.3B latents=outputs/NAME.latents.safetensors     # decode again, without denoising
  torchrun --nproc_per_node=8 -m wan_dist.run task=t2v-14B jobs=prompts.txt output.dir=videos     # a video for each line
  python -m wan_dist.run task=t2v-1.3B --cfg job                                    # print all settings, run nothing"""


def help_text() -> str:
    """Return what ``--help`` prints."""
    keys = [f"  {key:22} {item.metadata['help']}" for key, item in leaf_fields().items()]
    return "\n".join(
        [
            "Make a video with the Wan models: python -m wan_dist.run task=NAME [key=value ...]",
            f"\nTasks: {', '.join(TASKS)}\n\nKeys (a task sets its own defaults in conf/task/NAME.yaml):",
            *keys,
            f"\nExamples:\n{EXAMPLES}\n\n--hydra-help lists the flags of Hydra, which reads the configuration.",
        ]
    )


def main(arguments: list[str]) -> int:
    """Run the command with these arguments and return its exit code."""
    protect_streams()
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text() + "\n")
        return 0
    ranks = Ranks()
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # what one stage leaves is of use to the next
    with heed_signals():
        try:
            with preemption.heeded():
                ranks = _prepare_rank()
                return _run_alone(arguments) if ranks.num_ranks == 1 else _run_in_team(arguments, ranks)
        except (Exception, Preempted) as fault:
            return _report(fault, ranks)


def _report(fault: Exception | Preempted, ranks: Ranks) -> int:
    """Say what ended the run, unless another rank does, and return the exit code."""
    is_said = ranks.rank == 0
    if isinstance(fault, Preempted):
        return _fail(CODE, str(fault), "", is_said=is_said)
    other = getattr(fault, "fault", None)  # of an error that another rank has met and says
    if other is not None and (other.kind == "signal" or preemption.asked_by is not None):
        return _fail(CODE, f"{other.text}; the same command goes on", "", is_said=is_said)
    if other is not None:
        return _fail_after(other.kind, str(fault))
    if isinstance(fault, InputError):
        return _fail(2, str(fault))
    if preemption.asked_by is not None and any(note.startswith("waiting for rank") for note in getattr(fault, "__notes__", [])):
        message = "asked to end, as another rank was, which has; the same command goes on"
        return _fail(CODE, message, "", is_said=is_said)
    logger.error("the run failed", exc_info=fault)
    bury_launcher()
    return _fail(1, _described(fault))


def _prepare_rank() -> Ranks:
    """Find this rank's place among all, its log and its network; raises InputError for an environment that contradicts itself."""
    settle_environment()
    adopt_slurm()
    ranks = read_ranks()
    open_log()
    if is_shell_of_srun():
        logger.info("ranks     one: srun's other tasks ended as this shell was opened; `python -m launch local` takes all GPUs")
    if note := settle_caches():
        logger.info("note      %s", note)
    choose_network()
    die_with_launcher()
    return ranks


def _run_alone(arguments: list[str]) -> int:
    """Run on one rank, whose settings are checked before torch is imported, which takes seconds."""
    config = configured(arguments)
    if config is None:
        return 0
    _warn_of_cache(config)
    planned = _planned(config, arguments, Ranks(), _gpu_bytes)
    from wan_dist.parallel.team import Team

    return _start(config, planned, arguments, Team(Ranks(), config.parallel.timeout))


def _run_in_team(arguments: list[str], ranks: Ranks) -> int:
    """Run as one of several ranks: they meet before they plan, and the first one plans for all."""
    from wan_dist.parallel.shared_work import kind_of, text_of
    from wan_dist.parallel.team import Fault, Team

    config: RunConfig | None = None
    wrong: InputError | None = None
    try:
        config = configured(arguments)
    except InputError as fault:
        wrong = fault
    team = Team(ranks, _JOIN_SECONDS if config is None else config.parallel.timeout)
    try:
        if wrong is not None:
            raise wrong
        if config is None:
            return 0
        _warn_of_cache(config)
        facts = find_facts(config, _gpu_name(config), _gpu_bytes(config))
        least = check_alike(team.gather(facts, "start"))
        planned = team.share(lambda: _planned(config, arguments, ranks, lambda _: least), "check the settings")
        with preemption.noted():  # and heeded where ranks work together: between, others would not learn of it
            return _start(config, planned, arguments, team)
    except BaseException as fault:  # whatever it is, the others wait for this rank
        kind, text = kind_of(fault), text_of(fault)
        with preemption.noted(), contextlib.suppress(RuntimeError):  # of a store that is gone, with who would have to know
            team.fail(kind, text)
            if getattr(fault, "fault", None) is None and team.is_told_by_others(text):
                vars(fault)["fault"] = Fault(team.rank, "", kind, text)
            if isinstance(fault, Exception | Preempted):
                return _report(fault, ranks)  # before a rank leaves: then torchrun asks the others to end, as if nothing had failed
        raise
    finally:
        with preemption.noted():
            team.leave()


def _warn_of_cache(config: RunConfig) -> None:
    if (folder := config.cache.folder()) is not None and not is_writable(folder):
        logger.info("note      cache.dir=%s cannot be written: prompt embeddings are not kept; name another folder", folder)


def _planned(
    config: RunConfig, arguments: list[str], ranks: Ranks, gpu_bytes: Callable[[RunConfig], int | None]
) -> Plan | list[tuple[Job, RunConfig, Plan]]:
    """Return what is to be made; raises InputError for what cannot be."""
    counts = (ranks.num_ranks, ranks.ranks_per_node)
    if config.jobs is None:
        return make_plan(config, ranks=counts)
    return check_jobs(config, arguments, ranks=counts, gpu_bytes=gpu_bytes(config))


def _start(config: RunConfig, planned: "Plan | list[tuple[Job, RunConfig, Plan]]", arguments: list[str], team: "Team") -> int:
    if isinstance(planned, Plan):
        from wan_dist.pipeline.generate import run_job

        run_job(config, planned, team)
        return 0
    from wan_dist.jobs.worker import Item, run_jobs

    return run_jobs(config, [Item(job, own, plan) for job, own, plan in planned], arguments, team)


def check_jobs(
    config: RunConfig, arguments: list[str], *, ranks: tuple[int, int], gpu_bytes: int | None
) -> list[tuple[Job, RunConfig, Plan]]:
    """Return each job of a run's file with its configuration and plan; raises InputError with the line of one that cannot be made.

    ``arguments`` are those of the run, ``ranks`` how many it has, and on a node, ``gpu_bytes`` the memory of each one's GPU. It is
    enough to call it on one rank: what it returns can be pickled, in about 1 kB a job, of which most is the prompt. Images are not
    decoded, and those that jobs share are looked at once.
    """
    assert config.jobs is not None
    jobs = read_jobs(Path(config.jobs).expanduser())
    for job in jobs:
        job.check_keys()
    shared = [argument for argument in arguments if argument.partition("=")[0] not in ("jobs", "output.name")]
    configs = [each for _, each in configs_of(jobs, shared, _configured)]
    checked = []
    size_of_image = cache(image_size)
    for job, each in zip(jobs, spread(configs, *ranks, gpu_bytes, size_of_image), strict=True):
        try:
            checked.append((job, each, make_plan(each, ranks=ranks, is_job=True, size_of_image=size_of_image)))
        except InputError as fault:
            raise InputError(f"{job.place}: {fault}") from None
    return checked


def _configured(arguments: Sequence[str]) -> RunConfig:
    config = configured(arguments)
    assert config is not None
    return config


def _gpu_bytes(config: RunConfig) -> int | None:
    """Return the memory of this rank's GPU, None where the run is on the CPU."""
    if config.device == "cpu":
        return None
    import torch

    from wan_dist.parallel.mesh import local_device

    return int(torch.cuda.get_device_properties(local_device("cuda")).total_memory) if torch.cuda.is_available() else None


def _gpu_name(config: RunConfig) -> str | None:
    """Return what tells this rank's GPU from others of its host, None where the run is on the CPU."""
    if config.device == "cpu":
        return None
    import torch

    from wan_dist.parallel.mesh import local_device

    if not torch.cuda.is_available():
        return None
    slice_ = text_of("CUDA_VISIBLE_DEVICES").partition(",")[0]
    return slice_ if slice_.startswith("MIG-") else str(torch.cuda.get_device_properties(local_device("cuda")).uuid)


def _described(fault: Exception) -> str:
    """Return an error in a line: what, where, and on which rank of which host."""
    first = next(iter(str(fault).splitlines()), "")
    where = "; ".join(getattr(fault, "__notes__", [])[:2])
    if (ranks := read_ranks()).num_ranks > 1:
        where = "; ".join(part for part in (where, f"rank {ranks.rank} on {socket.gethostname()}") if part)
    return f"{type(fault).__name__}: {first}" + (f" ({where})" if where else "")


def _fail_after(kind: str, message: str) -> int:
    """End without a word: another rank has said what is wrong."""
    logger.debug("another rank has failed: %s", message)
    bury_launcher()
    return _note_failure({"input": 2, "signal": CODE}.get(kind, 1), told(message), delay=1)  # torchrun names the first


def _fail(code: int, message: str, kind: str = "error: ", *, is_said: bool = True) -> int:
    message = told(message)
    if is_said:
        sys.stderr.write(f"wan_dist: {kind}{message}\n")
    return _note_failure(code, message)


def _note_failure(code: int, message: str, *, delay: int = 0) -> int:
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with the first failing rank's message
        entry = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()) + delay)}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": entry}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
