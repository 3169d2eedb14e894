"""Digests of what latents and results depend on: equal digests mean equal results; no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.checks import FILE_LIST_KEYS, split_files
from wan_dist.config.schema import select_new_settings
from wan_dist.config.settings import SettingValues
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.environment import read_text_variable
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_unchanged_file
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file
from wan_dist.tasks.animate import FOLDER_KEY
from wan_dist.tasks.camera import MOTIONS
from wan_dist.tasks.fun import FunInputs
from wan_dist.tasks.input_files import INPUT_KEYS, list_input_files

FORMAT_VERSION = 2
"""Format of digests, resume states and records; raised when one of another version would be misread."""
NUMERICS_VERSION = 1
"""Version of the numerics; raised when the same settings give other latents or frames, beyond rounding."""


@dataclass(frozen=True)
class WeightsDigests:
    """Digests of a checkpoint's weights: of all its models, and of the VAE alone."""

    checkpoint_digest: str
    vae_digest: str


def compute_latents_digest(
    settings: SettingValues, plan: VideoPlan, weights_digests: WeightsDigests, *, is_job: bool
) -> str:
    """Return the digest of all that a video's latents depend on.

    ``settings``: those with `Effect.LATENTS`. The name is part of it, so that two runs of the same settings
    each have a resume state of their own. Raises InputError for an image or latents that cannot be read.
    """
    name = settings["output.name"]
    if (latents_file := settings["latents"]) is not None:
        return _compute_digest(
            {"latents": _compute_file_digest("latents", latents_file), "name": name}
        )
    step_cache = settings["cache.steps"]
    depends_on: dict[str, object] = {
        "weights": weights_digests.checkpoint_digest,
        "task": settings["task"],
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        **({} if plan.driving_prompt is None else {"driving_prompt": plan.driving_prompt}),
        "images": {
            key: _compute_input_digest(key, value)
            for key, value in list_input_files(settings).items()
        },
        "size": (plan.width, plan.height, plan.frame_num),
        "seed": settings["seed"],
        "noise_device": settings["noise_device"],
        "dtype": (
            settings["dtype"],
            settings["memory.vae_dtype"] if plan.has_encoded_input else None,
        ),
        "quant": settings["quant"],
        "attention": settings["attention"],
        "sample": (
            settings["sample.solver"],
            settings["sample.steps"],
            plan.sampling.shift,
            plan.sampling.guide_scales,
        ),
        "cache": (step_cache, settings["cache.threshold"] if step_cache else None),
        "name": name,
    }
    depends_on |= _select_new_settings(settings)
    if (camera := settings.get("camera")) is not None and camera not in MOTIONS:
        depends_on["camera"] = _compute_file_digest("camera", camera)
    if isinstance(plan.task.inputs, FunInputs) and plan.source is not None:
        depends_on["frames"] = plan.source.frame_indices  # fps decides on them
    if plan.speech is not None and plan.speech.pose is not None:
        depends_on["sync"] = plan.speech.is_exact  # else only what is made of the latents does
    # A random seed is drawn anew by each submission, but not when Slurm requeues it; for a job, once for its
    # line of the file of jobs.
    if settings["seed"] == -1 and not is_job:
        depends_on["job"] = (
            read_text_variable("SLURM_JOB_ID"),
            read_text_variable("SLURM_ARRAY_TASK_ID"),
        )
    return _compute_digest(depends_on)


def compute_result_digest(
    settings: SettingValues, plan: VideoPlan, latents: str, weights_digests: WeightsDigests
) -> str:
    """Return the digest of all that a result's files depend on.

    ``settings``: those with `Effect.RESULT`; ``latents``: the digest of its latents.
    """
    file_type = "png" if plan.task.is_still else "mp4"
    vae_settings = (weights_digests.vae_digest, settings["dtype"], settings["memory.vae_dtype"])
    return _compute_digest(
        {
            "latents": latents,
            "kind": file_type,
            "fps": plan.fps,
            "tensor": settings["output.save_tensor"],
            "vae": vae_settings,
            **_select_new_settings(settings),
            **_digest_audio(settings.get("output.audio")),
        }
    )


def _digest_audio(file: str | None) -> dict[str, str]:
    return {} if file is None else {"audio": _compute_file_digest("output.audio", file)}


def _select_new_settings(settings: SettingValues) -> dict[str, object]:
    """Return settings that earlier versions did not have, but for input files, whose content counts."""
    new_settings = select_new_settings(settings)
    file_keys = (*INPUT_KEYS, FOLDER_KEY, "output.audio")
    return {key: value for key, value in new_settings.items() if key not in file_keys}


def _compute_digest(depends_on: Mapping[str, object]) -> str:
    digest_input = {"format": FORMAT_VERSION, "numerics": NUMERICS_VERSION, **depends_on}
    return hashlib.sha256(json.dumps(digest_input, sort_keys=True).encode()).hexdigest()[:12]


def _compute_input_digest(key: str, value: str) -> str:
    """Return the digest of a file's content, or those of several files in their order."""
    files = map(str, split_files(value)) if key in FILE_LIST_KEYS else [value]
    return " ".join(_compute_file_digest(key, file) for file in files)


def _compute_file_digest(key: str, file: str) -> str:
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
        return hash_unchanged_file(path)
    except (OSError, UnreadableFileError) as error:
        raise InputError(
            f"{key}={file} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        ) from None
