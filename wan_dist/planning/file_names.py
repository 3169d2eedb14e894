"""File names of a result: requested ones, or made of task, prompt and seed; no torch."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from wan_dist.config.checks import check_file_name
from wan_dist.config.schema import RunConfig

_SETTINGS_WITHOUT_EFFECT = (
    "device",
    "jobs",
    "retry_failed",
    "parallel",
    "fsdp",
    "memory",
    "output",
)
"""Settings that do not change a result, or not more than rounding does."""


def name_result(config: RunConfig, prompt: str | None, seed: int) -> str:
    """Return the file name of a result, without suffix.

    It is the requested name, or that of the saved latents, or one made of task, prompt, seed and a hash
    of the settings. Raises InputError if the latents' name is no name for a file.
    """
    if config.output.name is not None:
        return config.output.name.removesuffix(".mp4").removesuffix(".png")
    if config.latents is not None:
        name = Path(config.latents).name.removesuffix(".safetensors").removesuffix(".latents")
        check_file_name("output.name (from latents)", name)
        return name
    return "_".join(
        part
        for part in (
            config.task,
            slugify_prompt(prompt or ""),
            str(seed),
            _compute_settings_hash(config, prompt),
        )
        if part
    )


def _compute_settings_hash(config: RunConfig, prompt: str | None) -> str:
    """Return a hash that tells apart runs whose prompts begin alike or whose other settings differ."""
    settings = {
        key: value for key, value in asdict(config).items() if key not in _SETTINGS_WITHOUT_EFFECT
    }
    settings |= {
        "prompt": prompt,
        "tensor": config.output.save_tensor,
        "vae_dtype": config.memory.vae_dtype,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def slugify_prompt(prompt: str) -> str:
    """Return the beginning of a prompt as part of a file name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40].strip("-")
