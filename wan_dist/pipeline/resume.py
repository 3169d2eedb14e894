"""What a run that was ended early keeps in its output folder, to go on from when the same command is given again."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.locks import Ledger
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.collectives import broadcast, broadcast_object
from wan_dist.parallel.mesh import Axis
from wan_dist.planning.digests import FORMAT, WeightsDigests, latents_digest, result_digest
from wan_dist.planning.plan import Plan
from wan_dist.runtime.atomic_write import set_aside
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.log import logger

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
    """The file of a run's progress. Its name has a digest of all that the latents depend on, so it is found by that alone.

    Raises InputError for an image or latents that cannot be read.
    """

    def __init__(
        self, folder: Path, config: RunConfig, plan: Plan, weights: WeightsDigests, *, is_job: bool = False, ledger: Ledger | None = None
    ) -> None:
        self.folder, self.config, self.plan, self.weights, self.is_job = folder, config, plan, weights, is_job
        self.ledger = ledger or Ledger(folder)
        self.progress = Progress()
        self.num_found = 0
        """Steps that an earlier run had done."""
        self._is_resumed = False

    @cached_property
    def latents_digest(self) -> str:
        """Digest of all that the latents depend on."""
        return latents_digest(self.config, self.plan, self.weights, is_job=self.is_job)

    @cached_property
    def digest(self) -> str:
        """Digest of all that the result depends on."""
        return result_digest(self.config, self.plan, self.latents_digest, self.weights)

    @property
    def _suffix(self) -> str:
        return f".{self.latents_digest}.state.safetensors"

    def _find(self) -> Path | None:
        """Return the file; where a seed was drawn, or a number put to the name, that is known from it alone.

        One of a single run is taken with its name: another run of the same settings may be at it.
        """
        file = self.folder / f"{self.plan.name}{self._suffix}"
        if self.is_job:
            return file if file.exists() else None
        found = sorted(self.folder.glob(f"*{self._suffix}"), key=lambda other: other != file)
        return next((other for other in found if self.ledger.lock(other.name.removesuffix(self._suffix))), None)

    def _read(self, file: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """Return what a file of ours has in its header and its tensors, None for another's; one that is damaged is set aside."""
        try:
            with safe_open(file, "pt") as opened:
                facts = opened.metadata() or {}
                if facts.get("digest") != self.latents_digest:
                    return None
                return facts, {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118  # it is no dict
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as fault:
            logger.warning("%s is damaged (%s); %s, and its steps are made again", file, first_line(fault), set_aside(file))
            return None

    def _stored(self) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """Return the kept progress, or whole latents: of a video that was not finished, or of one of which only the frames change."""
        file = self._find()
        found = None if file is None else self._read(file)
        if found is not None and _is_progress(*found):
            logger.info("goes on   after %s steps, from %s", found[0]["num_done"], file)
            self._is_resumed = True
            return found
        latents = self.folder / f"{self.plan.name}.latents.safetensors"
        if not latents.exists():
            return None
        if not self.is_job and ((self.folder / f"{self.plan.name}.json").exists() or not self.ledger.lock(self.plan.name)):
            return None
        found = self._read(latents)
        if found is None or "latents" not in found[1]:
            return None
        return {"seed": str(self.plan.seed)} | found[0] | {"num_done": str(self.config.sample.steps), "name": self.plan.name}, found[1]

    def agree(self, axis: Axis, device: torch.device) -> None:
        """Give all ranks of the axis the first one's progress: another may have come a step further before it learnt of an error."""
        self._send(self.progress.num_done, self._tensors(self.progress), axis, device)

    def _send(self, num_done: int, tensors: dict[str, Tensor], axis: Axis, device: torch.device) -> None:
        num_done, names = broadcast_object((num_done, list(tensors)), axis)
        sent = {name: cast(Tensor, broadcast(tensors.get(name), axis, device)).to(device) for name in names}
        guesses = {name.removeprefix(_GUESSES): sent.pop(name) for name in names if name.startswith(_GUESSES)}
        self.progress = Progress(num_done, sent.pop("latents", None), sent, guesses)

    @staticmethod
    def _tensors(progress: Progress) -> dict[str, Tensor]:
        if progress.latents is None:
            return {}
        guesses = {f"{_GUESSES}{name}": tensor for name, tensor in progress.guesses.items()}
        return {"latents": progress.latents, **progress.solver, **guesses}

    def go_on(self, axis: Axis, device: torch.device) -> Plan:
        """Read the progress that was kept, if any, on the first rank of the axis, for all; returns the plan with its seed and name."""
        facts = {"num_done": "0", "seed": str(self.plan.seed), "name": self.plan.name}
        facts, stored = (self._stored() if axis.rank == 0 else None) or (facts, {})
        facts = broadcast_object(facts, axis)
        self._send(int(facts["num_done"]), stored, axis, device)
        self.num_found = self.progress.num_done
        self.plan = replace(self.plan, seed=int(facts["seed"]), name=facts["name"])
        return self.plan

    def reserve(self, *, fixed: bool) -> Path:
        """Return the result's path, which is nobody else's until this process ends.

        A job's name is taken already. A name the user chose is replaced, one we made up gets a number rather than overwrite. Raises
        InputError where another run is at the name that was chosen.
        """
        suffix = ".png" if self.plan.task.still else ".mp4"
        path, number = self.folder / f"{self.plan.name}{suffix}", 1
        if self.is_job:
            return path
        while not self.ledger.lock(path.stem) or (not fixed and not self._is_resumed and path.exists()):
            if fixed:
                raise InputError(
                    f"output.name={path.stem}: another run is making it in {self.folder}; wait for that one, or take another output.name"
                )
            number += 1
            path = self.folder / f"{self.plan.name}_{number}{suffix}"
        return path

    def rename(self, plan: Plan, name: str) -> Plan:
        """Return the plan with the name that was reserved."""
        self.plan = replace(self.plan, name=name)
        return replace(plan, name=name)

    @property
    def facts(self) -> dict[str, str]:
        """What the headers of latents and of progress say of them."""
        return {"digest": self.latents_digest, "format": str(FORMAT), "seed": str(self.plan.seed), "name": self.plan.name}

    def write(self, progress: Progress) -> bool:
        """Keep this progress, in place of what was kept before; returns whether it could be, and warns if not."""
        try:
            if not torch.isfinite(cast(Tensor, progress.latents)).all():
                return False  # who goes on from them would fail for ever
            tensors, facts = self._tensors(progress), self.facts | {"num_done": str(progress.num_done)}
            save_tensors(
                self.folder / f"{self.plan.name}{self._suffix}", {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, facts
            )
        except (RuntimeError, InputError) as fault:  # a disk that is full, a GPU that is in error, an image that is gone
            logger.warning("progress cannot be kept: %s", first_line(fault))
            return False
        return True

    def remove(self) -> None:
        """Remove the file, if there is one."""
        (self.folder / f"{self.plan.name}{self._suffix}").unlink(missing_ok=True)


def _is_progress(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file that can be read holds what a run goes on from."""
    has_numbers = facts.get("num_done", "").isdigit() and facts.get("seed", "").isdigit()
    return has_numbers and "name" in facts and "latents" in tensors and bool(torch.isfinite(tensors["latents"]).all())


def warn_of_older(folder: Path) -> None:
    """Name states in a folder that an earlier version has kept, which this one does not read."""
    for file in folder.glob("*.state.safetensors"):
        try:
            with safe_open(file, "pt") as opened:
                facts = opened.metadata() or {}
        except (OSError, SafetensorError):
            continue  # damaged: said by the run whose it is
        if facts.get("format") != str(FORMAT):
            logger.warning("%s is of an earlier version of wan-dist and is not gone on from; remove it, or use that version", file)
