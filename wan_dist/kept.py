"""What a run that was asked to end keeps in its output folder, to go on from when the same command is given again."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.config import RunConfig
from wan_dist.log import logger
from wan_dist.parallel.collectives import broadcast, broadcast_object
from wan_dist.parallel.mesh import Axis
from wan_dist.plan import Plan
from wan_dist.video import save_tensors

_OF_NO_MATTER = ("device", "fps", "latents", "memory", "output", "parallel", "fsdp", "jobs", "retry_failed", "ckpt_dir", "dit_file")
"""Settings that may differ when a run goes on: they do not change the latents, or not more than rounding does."""

_GUESSES = "guesses."


@dataclass(frozen=True)
class Progress:
    """How far denoising has come."""

    num_done: int = 0
    """Steps."""
    latents: Tensor | None = None
    """(C, T, h, w), float32, after that many steps."""
    solver: dict[str, Tensor] = field(default_factory=dict)
    """See `Solver.state`."""
    guesses: dict[str, Tensor] = field(default_factory=dict)
    """See `EasyCache.state`."""


class Kept:
    """The file of a run's progress. Its name has a digest of all that the result depends on, so it is found by that alone.

    ``weights`` is a digest of the checkpoint's files.
    """

    def __init__(self, folder: Path, config: RunConfig, plan: Plan, weights: str, *, is_job: bool = False) -> None:
        settings = {key: value for key, value in asdict(config).items() if key not in _OF_NO_MATTER}
        settings["weights"] = weights
        settings |= {"prompt": plan.prompt, "negative_prompt": plan.negative_prompt, "size": (plan.width, plan.height)}
        settings["images"] = [(image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in plan.images]
        settings |= {"cache": (config.cache.steps, config.cache.threshold), "vae_dtype": config.memory.vae_dtype}
        settings["name"] = config.output.name
        if config.seed == -1 and not is_job:  # drawn anew by each submission, but not when it is requeued; once for a line of a file
            settings["job"] = [os.environ.get(key) for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")]
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.folder = folder
        self.plan = plan
        self.num_steps = config.sample.steps
        self._is_job = is_job
        self.progress = Progress()

    def _find(self) -> Path | None:
        if self._is_job:  # whose name is given; its folder may hold 100,000 files
            file = self._file()
            return file if file.exists() else None
        return next(self.folder.glob(f"*.{self.digest}.state.safetensors"), None)

    def _file(self) -> Path:
        return self.folder / f"{self.plan.name}.{self.digest}.state.safetensors"

    def _latents(self) -> Tensor | None:
        """Return the denoised latents of a job that was ended before its video was whole."""
        if not self._is_job:
            return None
        try:
            with safe_open(self.folder / f"{self.plan.name}.latents.safetensors", "pt") as opened:
                is_ours = (opened.metadata() or {}).get("digest") == self.digest
                return cast(Tensor, opened.get_tensor("latents")) if is_ours else None
        except (OSError, SafetensorError):
            return None

    def go_on(self, axis: Axis, device: torch.device) -> Plan:
        """Read the progress that was kept, if any, on the first rank of the axis, for all; returns the plan with its seed and name."""
        stored: dict[str, Tensor] = {}
        facts = {"num_done": "0", "seed": str(self.plan.seed), "name": self.plan.name}
        if axis.rank == 0 and (file := self._find()) is not None:
            with safe_open(file, "pt") as opened:
                facts |= opened.metadata()
                stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no dict
            logger.info("goes on   after %s steps, from %s", facts["num_done"], file)
        elif axis.rank == 0 and (latents := self._latents()) is not None:
            facts["num_done"], stored = str(self.num_steps), {"latents": latents}
        facts, names = broadcast_object((facts, list(stored)), axis)
        tensors = {name: cast(Tensor, broadcast(stored.get(name), axis, device)).to(device) for name in names}
        guesses = {name.removeprefix(_GUESSES): tensors.pop(name) for name in names if name.startswith(_GUESSES)}
        self.progress = Progress(int(facts["num_done"]), tensors.pop("latents", None), tensors, guesses)
        self.plan = replace(self.plan, seed=int(facts["seed"]), name=facts["name"])
        return self.plan

    def write(self, progress: Progress) -> Path:
        """Keep this progress, in place of what was kept before; returns the file."""
        assert progress.latents is not None
        file = self._file()
        facts = {"num_done": str(progress.num_done), "seed": str(self.plan.seed), "name": self.plan.name}
        guesses = {f"{_GUESSES}{name}": tensor for name, tensor in progress.guesses.items()}
        tensors = {"latents": progress.latents, **progress.solver, **guesses}
        save_tensors(file, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, facts)
        return file

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if (file := self._find()) is not None:
            file.unlink()
