"""Resume state of a run: its progress, saved in the output folder, from which the same command resumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import Effect
from wan_dist.config.video_formats import STILL_SUFFIX
from wan_dist.output.locks import ResultLocks
from wan_dist.output.record import DONE
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.collectives import broadcast, broadcast_object
from wan_dist.parallel.mesh import Axis
from wan_dist.planning.digests import (
    FORMAT_VERSION,
    WeightsDigests,
    compute_latents_digest,
    compute_result_digest,
)
from wan_dist.planning.file_names import name_latents
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.atomic_write import quarantine_file
from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.log import logger

FileContents = tuple[dict[str, str], dict[str, Tensor]]
"""Header and tensors of a file."""
_STEP_CACHE_PREFIX = "guesses."


@dataclass(frozen=True)
class DenoisingProgress:
    """Completed denoising steps, and the state after them."""

    num_done: int = 0
    """Completed steps."""
    latents: Tensor | None = None
    """(C, T, h, w), float32, after that many steps."""
    solver_state: dict[str, Tensor] = field(default_factory=dict)
    """See `Solver.state`."""
    step_cache_state: dict[str, Tensor] = field(default_factory=dict)
    """See `EasyCache.state`."""


class ResumeState:
    """File of a run's progress, found by the digest in its name, of all that the latents depend on.

    Raises InputError for an image or latents that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        plan: VideoPlan,
        weights_digests: WeightsDigests,
        *,
        is_job: bool = False,
        locks: ResultLocks | None = None,
    ) -> None:
        self.folder, self.config, self.plan, self.weights_digests, self.is_job = (
            folder,
            config,
            plan,
            weights_digests,
            is_job,
        )
        self.locks = locks or ResultLocks(folder)
        self.progress = DenoisingProgress()
        self.num_resumed_steps = 0
        """Steps that the resumed run had completed."""
        self.clip_index = 0
        """Index of the clip that the progress belongs to, from 0."""
        self._saved_clip_index = 0
        """Index of the clip that the file's progress belongs to."""
        self._is_resumed = False

    @cached_property
    def latents_digest(self) -> str:
        """Digest of all that the latents depend on."""
        settings = read_settings(self.config, Effect.LATENTS)
        return compute_latents_digest(settings, self.plan, self.weights_digests, is_job=self.is_job)

    @cached_property
    def result_digest(self) -> str:
        """Digest of all that the result depends on."""
        settings = read_settings(self.config, Effect.RESULT)
        return compute_result_digest(settings, self.plan, self.latents_digest, self.weights_digests)

    @property
    def _file_suffix(self) -> str:
        return f".{self.latents_digest}.state.safetensors"

    @property
    def _result_suffix(self) -> str:
        return STILL_SUFFIX if self.plan.task.is_still else self.config.output.format.suffix

    def _find_file(self) -> Path | None:
        """Return the file, None if there is none.

        A seed that was drawn, or a number in the name, is known from it alone. A single run takes it only
        with the lock on its name: another run of the same settings may be using it.
        """
        file = self.folder / f"{self.plan.name}{self._file_suffix}"
        if (
            self.is_job
        ):  # has a fixed name; a scan of the folder for each of many jobs would be quadratic
            return file if file.exists() else None
        candidates = sorted(
            self.folder.glob(f"*{self._file_suffix}"), key=lambda candidate: candidate != file
        )
        return next(
            (
                candidate
                for candidate in candidates
                if self.locks.acquire(candidate.name.removesuffix(self._file_suffix))
            ),
            None,
        )

    def _read_file(self, file: Path) -> FileContents | None:
        """Return a file's header and tensors, None if its digest is another; a damaged one is quarantined."""
        try:
            with safe_open(file, "pt") as reader:
                metadata = reader.metadata() or {}
                if metadata.get("digest") != self.latents_digest:
                    return None
                return metadata, {key: reader.get_tensor(key).clone() for key in reader.keys()}  # noqa: SIM118  # it is no dict
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning(
                "%s is damaged (%s); %s, and its steps are computed again",
                file,
                get_first_line(error),
                quarantine_file(file),
            )
            return None

    def _read_saved_progress(self) -> FileContents | None:
        """Return the header and tensors of saved progress, else of saved latents after all steps, else None.

        Where the saved progress is of a further clip, they are of the first clip's saved latents.
        """
        state_file = self._find_file()
        contents = None if state_file is None else self._read_file(state_file)
        if contents is None or not _is_valid_progress(*contents):
            return self._read_saved_latents()
        metadata, _ = contents
        self._is_resumed = True
        self._saved_clip_index = _get_clip_index(metadata)
        clip_text = f"clip {self._saved_clip_index + 1} " if self._saved_clip_index else ""
        logger.info(
            "resume    %scontinues from step %s of %d (%s)",
            clip_text,
            metadata["num_done"],
            self.config.sample.steps,
            state_file,
        )
        if self._saved_clip_index == 0:
            return contents
        self.plan = replace(self.plan, seed=int(metadata["seed"]), name=metadata["name"])
        return self._read_saved_latents() or (metadata | {"num_done": "0"}, {})

    def _read_saved_latents(self) -> FileContents | None:
        """Return the header and tensors of the clip's saved latents, after all steps, None if there are none.

        They are those of a video that was not finished, or of one of which only the decoding changes.
        """
        latents_file = self.folder / name_latents(self.plan.name, self.clip_index)
        if not latents_file.exists():
            return None
        if not (self.is_job or self._is_resumed) and (
            (self.folder / f"{self.plan.name}.json").exists()
            or not self.locks.acquire(self.plan.name)
        ):
            return None
        contents = self._read_file(latents_file)
        if contents is None or "latents" not in contents[1]:
            return None
        metadata = {"seed": str(self.plan.seed)} | contents[0]
        # A drawn seed is in no digest.
        if (self.clip_index or self._is_resumed) and metadata["seed"] != str(self.plan.seed):
            return None
        return metadata | {
            "num_done": str(self.config.sample.steps),
            "name": self.plan.name,
        }, contents[1]

    def synchronize_progress(self, axis: Axis, device: torch.device) -> None:
        """Broadcast the first rank's progress to all ranks of the axis.

        Another rank may have completed one more step before it learned of an error.
        """
        self._broadcast_progress(
            self.progress.num_done, self._collect_tensors(self.progress), axis, device
        )

    def _broadcast_progress(
        self, num_done: int, tensors: dict[str, Tensor], axis: Axis, device: torch.device
    ) -> None:
        num_done, tensor_names = broadcast_object((num_done, list(tensors)), axis)
        received_tensors = {
            name: cast(Tensor, broadcast(tensors.get(name), axis, device)).to(device)
            for name in tensor_names
        }
        step_cache_state = {
            name.removeprefix(_STEP_CACHE_PREFIX): received_tensors.pop(name)
            for name in tensor_names
            if name.startswith(_STEP_CACHE_PREFIX)
        }
        self.progress = DenoisingProgress(
            num_done, received_tensors.pop("latents", None), received_tensors, step_cache_state
        )

    @staticmethod
    def _collect_tensors(progress: DenoisingProgress) -> dict[str, Tensor]:
        if progress.latents is None:
            return {}
        step_cache_tensors = {
            f"{_STEP_CACHE_PREFIX}{name}": tensor
            for name, tensor in progress.step_cache_state.items()
        }
        return {"latents": progress.latents, **progress.solver_state, **step_cache_tensors}

    def restore(self, axis: Axis, device: torch.device) -> VideoPlan:
        """Restore saved progress, if any, on all ranks of the axis; returns the plan with its seed and name.

        The first rank reads it and broadcasts it.
        """
        metadata = {"num_done": "0", "seed": str(self.plan.seed), "name": self.plan.name}
        metadata, tensors = (self._read_saved_progress() if axis.rank == 0 else None) or (
            metadata,
            {},
        )
        metadata = broadcast_object(metadata, axis)
        self._broadcast_progress(int(metadata["num_done"]), tensors, axis, device)
        self.num_resumed_steps = self.progress.num_done
        self.plan = replace(self.plan, seed=int(metadata["seed"]), name=metadata["name"])
        return self.plan

    def begin_clip(self, clip_index: int, axis: Axis, device: torch.device) -> None:
        """Restore the progress of a further clip on all ranks of the axis, or save that the clip begins."""
        self.clip_index = clip_index
        metadata, tensors = (self._read_clip_progress() if axis.rank == 0 else None) or (
            {"num_done": "0"},
            {},
        )
        self._broadcast_progress(int(metadata["num_done"]), tensors, axis, device)
        self.num_resumed_steps += self.progress.num_done
        if axis.rank == 0 and clip_index > self._saved_clip_index:
            self.save_progress(self.progress)

    def _read_clip_progress(self) -> FileContents | None:
        """Return the header and tensors of a further clip's latents, else of its progress, else None."""
        if (latents := self._read_saved_latents()) is not None:
            return latents
        contents = self._read_file(self.folder / f"{self.plan.name}{self._file_suffix}")
        is_of_clip = (
            contents is not None
            and _is_valid_progress(*contents)
            and _get_clip_index(contents[0]) == self.clip_index
        )
        return contents if is_of_clip else None

    def reserve_path(self, *, is_name_fixed: bool) -> Path:
        """Return the result's path, reserved for this process until it ends.

        A job's name is reserved already. A result whose name the user chose is replaced; a generated name
        gets a number rather than replace one. Raises InputError where another run holds the name that was
        chosen.
        """
        suffix = self._result_suffix
        path, number = self.folder / f"{self.plan.name}{suffix}", 1
        if self.is_job:
            return path
        while not self.locks.acquire(path.stem) or (
            not is_name_fixed and not self._is_resumed and path.exists()
        ):
            if is_name_fixed:
                raise InputError(
                    f"output.name={path.stem}: another run is generating it in {self.folder}; "
                    "wait for that run, or use another output.name"
                )
            number += 1
            path = self.folder / f"{self.plan.name}_{number}{suffix}"
        return path

    def find_finished_result(self) -> Path | None:
        """Return the file of a finished result of these settings, None if there is none.

        A numbered one is found too. With a drawn seed each run makes another result.
        """
        if self.config.seed == -1 and self.config.latents is None:
            return None
        suffix = self._result_suffix
        name, number = self.plan.name, 1
        while (path := self.folder / f"{name}{suffix}").exists():
            is_done = self.locks.read_outcome(name, self.result_digest) == DONE
            if is_done and self._has_requested_latents(name):
                return path
            if self.config.output.name is not None:
                return None  # the name that was chosen is used again
            number += 1
            name = f"{self.plan.name}_{number}"
        return None

    def _has_requested_latents(self, name: str) -> bool:
        return (
            not self.config.output.save_latents
            or self.config.latents is not None
            or all(
                (self.folder / name_latents(name, clip_index)).exists()
                for clip_index in range(self.plan.num_clips)
            )
        )

    def rename_plan(self, plan: RunPlan, name: str) -> RunPlan:
        """Return the plan with the name that was reserved."""
        self.plan = replace(self.plan, name=name)
        return replace(plan, name=name)

    @property
    def metadata(self) -> dict[str, str]:
        """Header of the files of latents and of progress."""
        return {
            "digest": self.latents_digest,
            "format": str(FORMAT_VERSION),
            "seed": str(self.plan.seed),
            "name": self.plan.name,
        } | ({"clip": str(self.clip_index + 1)} if self.clip_index else {})

    def save_progress(self, progress: DenoisingProgress) -> bool:
        """Replace the saved progress with this; returns whether it was saved, and warns of an error.

        Progress of a later clip is not overwritten while the clips before it are decoded again.
        """
        if self.clip_index < self._saved_clip_index:
            return False
        try:
            if progress.latents is not None and not torch.isfinite(progress.latents).all():
                return False  # each run that resumes from them would fail
            tensors, metadata = (
                self._collect_tensors(progress),
                self.metadata | {"num_done": str(progress.num_done)},
            )
            save_tensors(
                self.folder / f"{self.plan.name}{self._file_suffix}",
                {key: tensor.cpu().contiguous() for key, tensor in tensors.items()},
                metadata,
            )
        # A full disk, a GPU in an error state, a deleted image.
        except (RuntimeError, InputError) as error:
            logger.warning("the progress cannot be saved: %s", get_first_line(error))
            return False
        self._saved_clip_index = self.clip_index
        return True

    def remove_file(self) -> None:
        """Remove the file, if there is one."""
        (self.folder / f"{self.plan.name}{self._file_suffix}").unlink(missing_ok=True)


def _is_valid_progress(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file that can be read holds progress to resume from."""
    numbers = (metadata.get("num_done", ""), metadata.get("seed", ""), metadata.get("clip", "1"))
    if "name" not in metadata or not all(number.isdigit() for number in numbers):
        return False
    if "latents" not in tensors:  # a further clip that has not started
        return metadata["num_done"] == "0" and _get_clip_index(metadata) > 0
    return bool(torch.isfinite(tensors["latents"]).all())


def _get_clip_index(metadata: Mapping[str, str]) -> int:
    return int(metadata.get("clip", "1")) - 1


def warn_about_old_states(folder: Path) -> None:
    """Warn of progress files in a folder that an earlier version saved, which this one does not read."""
    for file in folder.glob("*.state.safetensors"):
        try:
            with safe_open(file, "pt") as reader:
                metadata = reader.metadata() or {}
        except (OSError, SafetensorError):
            continue  # damaged: the run that it belongs to warns of it
        if metadata.get("format") != str(FORMAT_VERSION):
            logger.warning(
                "%s was saved by an earlier version of wan-dist, which alone can resume from it; "
                "use that version, or remove the file",
                file,
            )
