"""File names of a result: requested ones, or made of task, prompt and seed; no torch."""

import hashlib
import json
import re
from pathlib import Path

from wan_dist.config.checks import check_file_name
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import Effect

_EARLIER_CACHE_SETTINGS = {"dir": "auto", "size_gib": 1.0}
"""Defaults of settings without effect, which are hashed so that names stay those of earlier versions."""


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
    sections: dict[str, dict[str, object]] = {}
    for key, value in read_settings(
        config, Effect.WEIGHTS | Effect.LATENTS | Effect.RESULT
    ).items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    settings = sections.pop("") | {
        "sample": sections["sample"],
        "cache": sections["cache"] | _EARLIER_CACHE_SETTINGS,
        "prompt": prompt,
        "tensor": config.output.save_tensor,
        "vae_dtype": config.memory.vae_dtype,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def name_latents(name: str, clip_index: int) -> str:
    """Return the file name of a clip's latents beside the result ``name``."""
    clip_suffix = f".clip{clip_index + 1}" if clip_index else ""
    return f"{name}{clip_suffix}.latents.safetensors"


def slugify_prompt(prompt: str) -> str:
    """Return the beginning of a prompt as part of a file name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40].strip("-")
