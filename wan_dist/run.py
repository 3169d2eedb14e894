"""The command: ``python -m wan_dist.run task=... prompt=...``. Exit codes: 0 done, 1 the run failed, 2 bad input, 75 asked to end early."""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wan_dist.arguments import prepare, require_task
from wan_dist.catalog import TASKS
from wan_dist.config import RunConfig, leaf_fields, packaged, register_configs
from wan_dist.errors import InputError, told
from wan_dist.image_sizes import image_size
from wan_dist.jobs import Job, configs_of, read_jobs
from wan_dist.launcher import adopt_slurm, bury_launcher, die_with_launcher
from wan_dist.log import logger, open_log
from wan_dist.network import choose_network
from wan_dist.plan import Plan, make_plan, ranks_started
from wan_dist.preemption import CODE, Preempted, heed_signals, preemption
from wan_dist.replicas import spread

CONF = packaged("conf", "conf")

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
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text() + "\n")
        return 0
    adopt_slurm()
    open_log()
    choose_network()
    die_with_launcher()
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # what one stage leaves is of use to the next
    try:
        prepared = prepare(arguments)
        if "--hydra-help" not in prepared:
            require_task(prepared)
        config = compose(prepared)
        if config is not None:
            with heed_signals():
                return _run(config, arguments)
    except Preempted as stop:
        return _fail(CODE, str(stop), "")
    except InputError as fault:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # the first rank says the same, and torchrun ends us meanwhile
        return _fail(2, str(fault))
    except (HydraException, OmegaConfBaseException) as fault:
        return _fail(2, readable(fault))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except Exception as fault:
        if any(note.startswith("waiting for rank") for note in getattr(fault, "__notes__", [])):
            if preemption.asked_by is not None:
                return _fail(CODE, "asked to end, as another rank was, which has; the same command goes on", "")
            time.sleep(3)  # the rank that broke ends first, so that torchrun names it and not those it left waiting
        logger.exception("the run failed")
        bury_launcher()
        return _fail(1, _described(fault))
    return 0


def compose(arguments: list[str]) -> RunConfig | None:
    """Return the configuration of these arguments, or None after a flag that only prints, such as ``--cfg job``."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    register_configs()
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(keep)()
    return cast(RunConfig, OmegaConf.to_object(composed[0])) if composed else None


def _run(config: RunConfig, arguments: list[str]) -> int:
    if config.jobs is None:
        plan = make_plan(config)
        from wan_dist.generate import run_job  # after the checks: it imports torch and transformers, which takes seconds

        run_job(config, plan)
        return 0
    checked = check_jobs(config, arguments, ranks=ranks_started(), gpu_bytes=_gpu_bytes(config))
    from wan_dist.batch import Item, run_jobs

    return run_jobs(config, [Item(job, config, plan) for job, config, plan in checked], arguments)


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


def configured(arguments: Sequence[str]) -> RunConfig | None:
    """Return the configuration of a run's arguments, None after a flag that only prints; raises InputError."""
    prepared = prepare(list(arguments))
    require_task(prepared)
    try:
        return compose(prepared)
    except (HydraException, OmegaConfBaseException) as fault:
        raise InputError(readable(fault)) from None


def _configured(arguments: Sequence[str]) -> RunConfig:
    config = configured(arguments)
    assert config is not None
    return config


def _gpu_bytes(config: RunConfig) -> int | None:
    """Return the memory of this rank's GPU, None where the run is on the CPU."""
    if config.device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def readable(fault: Exception) -> str:
    """Return what Hydra or OmegaConf found wrong, in a line."""
    cause = fault.__cause__ if isinstance(fault.__cause__, OmegaConfBaseException) else fault  # Hydra's own says less
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    what = f"{key}: {lines[0]}" if key else lines[0]
    is_of_several = what.startswith(("Ambiguous value", "Sweep parameters"))  # Hydra's advice is for what is not done here
    return f"{what.partition(' requires')[0]}: a setting takes one value" if is_of_several else what


def _described(fault: Exception) -> str:
    """Return an error in a line: what, where, and on which rank of which host."""
    first = next(iter(str(fault).splitlines()), "")
    where = "; ".join(getattr(fault, "__notes__", [])[:2])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        where = "; ".join(part for part in (where, f"rank {os.environ.get('RANK')} on {socket.gethostname()}") if part)
    return f"{type(fault).__name__}: {first}" + (f" ({where})" if where else "")


def _fail(code: int, message: str, kind: str = "error: ") -> int:
    message = told(message)
    if kind or os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"wan_dist: {kind}{message}\n")
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with the first failing rank's message
        entry = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": entry}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
