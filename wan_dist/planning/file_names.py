"""File names of a result: requested ones, or made of task, prompt and seed; no torch."""

import hashlib
import json
import re
from pathlib import Path

from wan_dist.config.checks import check_file_name
from wan_dist.config.schema import select_new_settings
from wan_dist.config.settings import SettingValues
from wan_dist.config.video_formats import remove_result_suffix

_EARLIER_CACHE_SETTINGS = {"dir": "auto", "size_gib": 1.0}
"""Defaults of settings without effect, which are hashed so that names stay those of earlier versions."""


def name_result(settings: SettingValues, prompt: str | None, seed: int) -> str:
    """Return the file name of a result, without suffix.

    ``settings``: those that a run's files depend on, `OUTPUTS`; ``prompt`` and ``seed`` as resolved. It
    is the requested name, or that of the saved latents, or one made of task, prompt, seed and a hash of the
    settings. Raises InputError if the latents' name is no name for a file.
    """
    requested_name: str | None = settings["output.name"]
    if requested_name is not None:
        return remove_result_suffix(requested_name)
    if settings["latents"] is not None:
        name = Path(settings["latents"]).name.removesuffix(".safetensors").removesuffix(".latents")
        check_file_name("output.name (from latents)", name)
        return name
    return "_".join(
        part
        for part in (
            settings["task"],
            slugify_prompt(prompt or ""),
            str(seed),
            _compute_settings_hash(settings, prompt),
        )
        if part
    )


def _compute_settings_hash(settings: SettingValues, prompt: str | None) -> str:
    """Return a hash that tells apart runs whose prompts begin alike or whose other settings differ."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    hashed_settings = sections.pop("") | {
        # as earlier versions wrote it, so that names stay theirs
        "size": re.sub("[xX×]", "*", settings["size"].strip()),
        "sample": sections["sample"],
        "cache": sections["cache"] | _EARLIER_CACHE_SETTINGS,
        "prompt": prompt,
        "tensor": settings["output.save_tensor"],
        "vae_dtype": settings["memory.vae_dtype"],
    }
    new_settings = select_new_settings(settings)
    if new_output := {key: new_settings[key] for key in new_settings if key.startswith("output.")}:
        hashed_settings["output"] = new_output
    return hashlib.sha256(json.dumps(hashed_settings, sort_keys=True).encode()).hexdigest()[:6]


def name_latents(name: str, clip_index: int) -> str:
    """Return the file name of a clip's latents beside the result ``name``."""
    clip_suffix = f".clip{clip_index + 1}" if clip_index else ""
    return f"{name}{clip_suffix}.latents.safetensors"


def name_preview(name: str) -> str:
    """Return the file name of the picture of a result ``name`` that is being denoised."""
    return f"{name}.preview.jpg"


def slugify_prompt(prompt: str) -> str:
    """Return the beginning of a prompt as part of a file name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40].strip("-")
