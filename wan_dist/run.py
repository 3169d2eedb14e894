"""Command-line entry point of a run: ``python -m wan_dist.run task=... prompt=...``.

Exit codes: 0 done, 1 the run failed, 2 invalid input, 75 received a signal to end early.
"""

import atexit
import gc

from wan_dist.runtime.signals import (
    CONTINUE_ADVICE,
    EXIT_PREEMPTED,
    PreemptionInterrupt,
    exit_on_signal,
    handle_signals,
    preemption,
)

if __name__ == "__main__":
    exit_on_signal()  # before the imports below, which take a second
    gc.disable()  # until `_start_run`: imports leave no garbage, and looking for it takes 0.5 s

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wan_dist.config.schema import RunConfig, read_all_settings
from wan_dist.jobs.planned_job import PlannedJob, has_jobs, plan_jobs
from wan_dist.planning.plan import make_plan
from wan_dist.planning.rank_facts import check_ranks_match, collect_rank_facts
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.cache_folders import configure_library_caches, is_writable
from wan_dist.runtime.environment import (
    RankLayout,
    detect_launcher,
    read_rank_layout,
    sanitize_environment,
    silence_library_warnings,
)
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.runtime.launcher import (
    is_srun_pty_shell,
    schedule_launcher_kill,
    set_parent_death_signal,
    translate_slurm_variables,
)
from wan_dist.runtime.log import add_log_file, configure_logging, logger, protect_streams
from wan_dist.runtime.network import choose_network_interface
from wan_dist.service.request_planner import RequestPlanner, make_request_planner
from wan_dist.tasks.run_config import read_config
from wan_dist.usage import build_help_text

if TYPE_CHECKING:
    from wan_dist.parallel.team import Coordinator

PlannedWork = VideoPlan | list[PlannedJob] | RequestPlanner
"""A video, jobs, or what a service plans its requests with."""
_JOIN_TIMEOUT_SECONDS = 600.0
"""Seconds in which all ranks must join, if the settings do not say."""


def main(arguments: list[str]) -> int:
    """Run the command with these arguments and return its exit code."""
    protect_streams()
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(build_help_text() + "\n")
        return 0
    ranks = RankLayout()
    silence_library_warnings(os.environ)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # memory that one stage frees can be used by the next, whatever the sizes of its tensors
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with handle_signals():
        try:
            with preemption.interruptible():
                ranks = _prepare_rank()
                return (
                    _run_on_one_rank(arguments)
                    if ranks.num_ranks == 1
                    else _run_on_several_ranks(arguments, ranks)
                )
        except (Exception, PreemptionInterrupt) as error:
            return _report_failure(error, ranks)


def _report_failure(error: Exception | PreemptionInterrupt, ranks: RankLayout) -> int:
    """Print what ended the run, unless another rank does, and return the exit code."""
    is_first_rank = ranks.rank == 0
    if isinstance(error, PreemptionInterrupt):
        return _fail_with_message(EXIT_PREEMPTED, str(error), "", is_printed=is_first_rank)
    rank_failure = getattr(error, "fault", None)  # set if another rank has failed and prints it
    if rank_failure is not None and (
        rank_failure.kind == "signal" or preemption.requested_by is not None
    ):
        return _fail_with_message(
            EXIT_PREEMPTED,
            rank_failure.text
            if rank_failure.text.endswith(CONTINUE_ADVICE)
            else f"{rank_failure.text}; {CONTINUE_ADVICE}",
            "",
            is_printed=is_first_rank,
        )
    if rank_failure is not None:
        return _fail_silently(rank_failure.kind, str(error))
    if isinstance(error, InputError):
        return _fail_with_message(2, str(error))
    if preemption.requested_by is not None and any(
        note.startswith("waiting for rank") for note in getattr(error, "__notes__", [])
    ):
        message = f"{preemption.describe_request()}; {CONTINUE_ADVICE}"
        return _fail_with_message(EXIT_PREEMPTED, message, "", is_printed=is_first_rank)
    logger.error("the run failed", exc_info=error)
    schedule_launcher_kill()
    return _fail_with_message(1, _describe_error(error))


def _prepare_rank() -> RankLayout:
    """Read this rank's layout, and set up its log, cache folders and network.

    Raises InputError for an environment that contradicts itself.
    """
    sanitize_environment()
    translate_slurm_variables()
    ranks = read_rank_layout()
    configure_logging()
    if is_srun_pty_shell():
        logger.info(
            "ranks     1: srun's other tasks have ended with this shell; "
            "use `python -m launch local` for all GPUs"
        )
    if note := configure_library_caches():
        logger.info("note      %s", note)
    choose_network_interface()
    if detect_launcher() == "torchrun":
        set_parent_death_signal()
    return ranks


def _run_on_one_rank(arguments: list[str]) -> int:
    """Run on one rank; the settings are checked before torch is imported, which takes seconds."""
    config = read_config(arguments)
    if config is None:
        return 0
    _warn_unwritable_cache(config)
    planned_work = _plan_work(config, arguments, RankLayout(), _find_own_gpu_bytes)
    _announce_work(config, planned_work)  # before torch is imported
    from wan_dist.parallel.team import Coordinator

    return _start_run(
        config, planned_work, arguments, Coordinator(RankLayout(), config.parallel.timeout)
    )


def _run_on_several_ranks(arguments: list[str], ranks: RankLayout) -> int:
    """Run as one of several ranks: all join before planning, and the first one plans for all."""
    from wan_dist.parallel.local_gpu import find_gpu_bytes, find_gpu_id
    from wan_dist.parallel.shared_work import classify_error, describe_error
    from wan_dist.parallel.team import Coordinator, RankFailure

    config: RunConfig | None = None
    config_error: InputError | None = None
    try:
        config = read_config(arguments)
    except InputError as error:
        config_error = error
    join_timeout = _JOIN_TIMEOUT_SECONDS if config is None else config.parallel.timeout
    coordinator = Coordinator(ranks, join_timeout)
    try:
        if config_error is not None:
            raise config_error
        if config is None:
            return 0
        _warn_unwritable_cache(config)
        rank_facts = collect_rank_facts(
            read_all_settings(config), find_gpu_id(config.device), find_gpu_bytes(config.device)
        )
        min_gpu_bytes = check_ranks_match(coordinator.gather(rank_facts, "start"))
        planned_work = coordinator.run_on_first_rank(
            lambda: _plan_work(config, arguments, ranks, lambda _: min_gpu_bytes),
            "check the settings",
        )
        _announce_work(config, planned_work)
        # the run acts on signals where ranks work together: elsewhere, the others would not learn of it
        with preemption.deferred():
            return _start_run(config, planned_work, arguments, coordinator)
    except BaseException as error:  # whatever it is, the others wait for this rank
        error_kind, error_text = classify_error(error), describe_error(error)
        # RuntimeError: the store is gone, and with it the ranks that would have to know
        with preemption.deferred(), contextlib.suppress(RuntimeError):
            coordinator.announce_failure(error_kind, error_text)
            if getattr(error, "fault", None) is None and coordinator.is_reported_by_lower_rank(
                error_text
            ):
                vars(error)["fault"] = RankFailure(coordinator.rank, "", error_kind, error_text)
            if isinstance(error, Exception | PreemptionInterrupt):
                # before this rank leaves: torchrun then ends the others, as if nothing had failed
                return _report_failure(error, ranks)
        raise
    finally:
        with preemption.deferred():
            coordinator.leave()


def _warn_unwritable_cache(config: RunConfig) -> None:
    if (folder := config.cache.resolve_folder()) is not None and not is_writable(folder):
        logger.info(
            "note      cache.dir=%s cannot be written: prompt embeddings are not cached; use another folder",
            folder,
        )


def _plan_work(
    config: RunConfig,
    arguments: list[str],
    ranks: RankLayout,
    find_gpu_bytes: Callable[[RunConfig], int | None],
) -> PlannedWork:
    """Return what the run will do; raises InputError for what cannot be made."""
    rank_counts = (ranks.num_ranks, ranks.ranks_per_node)
    if config.serve.port is not None:
        gpu_bytes = find_gpu_bytes(config)
        return make_request_planner(config, arguments, ranks=rank_counts, gpu_bytes=gpu_bytes)
    if not has_jobs(config, arguments):
        return make_plan(config, ranks=rank_counts)
    return plan_jobs(config, arguments, ranks=rank_counts, gpu_bytes=find_gpu_bytes(config))


def _find_own_gpu_bytes(config: RunConfig) -> int | None:
    if config.device == "cpu":
        return None  # without importing torch
    from wan_dist.parallel.local_gpu import find_gpu_bytes

    return find_gpu_bytes(config.device)


def _start_run(
    config: RunConfig,
    planned_work: PlannedWork,
    arguments: list[str],
    coordinator: "Coordinator",
) -> int:
    from wan_dist.parallel.local_gpu import create_context_early

    create_context_early(config.device)
    from wan_dist.jobs.worker import run_jobs
    from wan_dist.pipeline.generate import generate_video

    if __name__ == "__main__":
        gc.freeze()  # a collection takes 0.2 s with what is imported, and 2 ms without
        atexit.register(gc.unfreeze)  # else triton takes what is imported for leaks, and says so
        gc.enable()
    if isinstance(planned_work, RequestPlanner):
        from wan_dist.service.worker import run_service

        run_service(planned_work, coordinator)
    if isinstance(planned_work, VideoPlan):
        generate_video(config, planned_work, coordinator)
        return 0
    return run_jobs(config, planned_work, arguments, coordinator)


def _announce_work(config: RunConfig, planned_work: PlannedWork) -> None:
    """Log what will be made, before the imports of what makes it; of jobs, what their settings ask about."""
    if isinstance(planned_work, VideoPlan):
        plans = [planned_work]
        if planned_work.degrees.num_ranks > 1:
            add_log_file(Path(config.output.dir).expanduser() / "logs" / planned_work.name)
        logger.info("video     %s", planned_work.summary)
    elif isinstance(planned_work, RequestPlanner):
        plans = [planned_work.plan_defaults().plan]
    else:
        plans = [job.plan for job in planned_work]
    if config.preset is not None and plans:
        logger.info("preset    %s: %s", config.preset, plans[0].sampling.description)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        logger.info("note      %s", note)


def _describe_error(error: Exception) -> str:
    """Return an error as one line: its type, message and place, and the rank and host."""
    first_line = next(iter(str(error).splitlines()), "")
    location = "; ".join(getattr(error, "__notes__", [])[:2])
    if (ranks := read_rank_layout()).num_ranks > 1:
        location = "; ".join(
            part for part in (location, f"rank {ranks.rank} on {socket.gethostname()}") if part
        )
    return f"{type(error).__name__}: {first_line}" + (f" ({location})" if location else "")


def _fail_silently(error_kind: str, message: str) -> int:
    """Return the exit code and print nothing: another rank has reported the error."""
    logger.debug("another rank has failed: %s", message)
    schedule_launcher_kill()
    # torchrun reports the earliest error: the delay leaves that to the rank that has failed
    return _write_torchrun_error(
        {"input": 2, "signal": EXIT_PREEMPTED}.get(error_kind, 1),
        format_message(message),
        delay_seconds=1,
    )


def _fail_with_message(
    exit_code: int, message: str, prefix: str = "error: ", *, is_printed: bool = True
) -> int:
    message = format_message(message)
    if is_printed:
        sys.stderr.write(f"wan_dist: {prefix}{message}\n")
    return _write_torchrun_error(exit_code, message)


def _write_torchrun_error(exit_code: int, message: str, *, delay_seconds: int = 0) -> int:
    # torchrun ends with the message of the first rank that failed
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error_entry = {
            "message": message,
            "errorCode": exit_code,  # a rank that torchrun ends meanwhile has another one
            "extraInfo": {
                "py_callstack": message,
                "timestamp": str(int(time.time()) + delay_seconds),
            },
        }
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": error_entry}))
    return exit_code


def exit_quickly(exit_code: int) -> NoReturn:
    """End the process after its threads and exit handlers, without freeing what the system frees anyway.

    Modules, tensors and the CUDA context one by one take 1.6 s.
    """
    # As the interpreter does at its end: it also ends the idle threads of executors.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    exit_quickly(main(sys.argv[1:]))
