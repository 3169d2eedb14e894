"""What latents depend on, and what a result depends on besides, as digests: equal digests, equal results. No torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wan_dist.config.schema import RunConfig
from wan_dist.planning.plan import Plan
from wan_dist.runtime.environment import text_of
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.text_files import UnreadableError, check_file

FORMAT = 2
"""Of digests, kept states and records; raised when one of another version would be misread."""
NUMERICS = 1
"""Raised when the same settings come to give other latents or frames, beyond rounding."""
_IMAGES = ("image", "first_frame", "last_frame")


@dataclass(frozen=True)
class WeightsDigests:
    """Of a checkpoint: of all its models, and of the VAE alone."""

    checkpoint: str
    vae: str


def latents_digest(config: RunConfig, plan: Plan, weights: WeightsDigests, *, is_job: bool) -> str:
    """Return the digest of all that a video's latents depend on.

    It has the name too, so that two runs of the same settings have a state each. Raises InputError for an image or latents that cannot be
    read.
    """
    if config.latents is not None:
        return _digest({"latents": _digest_of_file("latents", config.latents), "name": config.output.name})
    sample = config.sample
    depends_on: dict[str, object] = {
        "weights": weights.checkpoint,
        "task": config.task,
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        "images": {key: _digest_of_file(key, file) for key in _IMAGES if (file := getattr(config, key)) is not None},
        "size": (plan.width, plan.height, plan.frame_num),
        "seed": config.seed,
        "noise_device": config.noise_device,
        "dtype": (config.dtype, config.memory.vae_dtype if plan.num_images else None),
        "quant": config.quant,
        "attention": config.attention,
        "sample": (sample.solver, sample.steps, plan.shift, plan.guide_scales),
        "cache": (config.cache.steps, config.cache.threshold if config.cache.steps else None),
        "name": config.output.name,
    }
    if config.seed == -1 and not is_job:  # drawn anew by each submission, but not when it is requeued; once for a line of a file
        depends_on["job"] = (text_of("SLURM_JOB_ID"), text_of("SLURM_ARRAY_TASK_ID"))
    return _digest(depends_on)


def result_digest(config: RunConfig, plan: Plan, latents: str, weights: WeightsDigests) -> str:
    """Return the digest of all that the files of a result depend on, besides the digest of its ``latents``."""
    kind = "png" if plan.task.still else "mp4"
    vae = (weights.vae, config.dtype, config.memory.vae_dtype)
    return _digest({"latents": latents, "kind": kind, "fps": plan.fps, "tensor": config.output.save_tensor, "vae": vae})


def _digest(depends_on: Mapping[str, object]) -> str:
    known = {"format": FORMAT, "numerics": NUMERICS, **depends_on}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


def _digest_of_file(key: str, file: str) -> str:
    path = Path(file).expanduser()
    try:
        check_file(path)
        status = path.stat()
        return _digest_of_contents(str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    except (OSError, UnreadableError) as fault:
        raise InputError(f"{key}={file} cannot be read: {fault.strerror if isinstance(fault, OSError) else fault}") from None


@lru_cache(maxsize=2**15)
def _digest_of_contents(path: str, *_status: int) -> str:
    """Return the SHA-256 of a file, which is read once while its status stays the same."""
    return hash_file(Path(path))
