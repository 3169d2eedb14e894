"""Settings of LoRA files: which files, for which expert, and how strong each is; no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wan_dist.config.checks import split_files
from wan_dist.runtime.errors import InputError

EXPERTS = ("high", "low")
"""Experts of the tasks that have two, by the noise that they are for, in the order of their transformers."""
UNMATCHED_CHOICES = ("error", "allow")
_RELIGHTING_KEY = "use_relighting_lora"
RELIGHTING_REPOSITORY = "Wan-AI/Wan2.2-Animate-14B"
RELIGHTING_NAMES = ("relighting_lora.ckpt", "relighting_lora/adapter_model.safetensors")
"""Files of Animate's relighting LoRA in the published folder; both hold the same."""


@dataclass(frozen=True)
class LoraSetting:
    """One LoRA file, as it is requested."""

    key: str
    path: Path
    strength: float
    expert: str | None
    """high or low: the one expert that it is for; None: every transformer."""

    def __str__(self) -> str:
        """Return it as on the command line, for messages."""
        return f"{self.key}={self.path}"


class LoraSettings(Protocol):
    """The settings of a run that are of LoRAs."""

    lora: str | None
    lora_strength: Any
    lora_high: str | None
    lora_high_strength: Any
    lora_low: str | None
    lora_low_strength: Any
    use_relighting_lora: bool
    ckpt_dir: str | None


def list_loras(config: LoraSettings) -> list[LoraSetting]:
    """Return the LoRA files: the checkpoint's own, those of all transformers, those of one.

    Raises InputError as `list_given_loras`, and for a relighting LoRA that is not in the checkpoint's folder.
    """
    given = list_given_loras(config)
    if not config.use_relighting_lora:
        return given
    path = _find_relighting_lora(config.ckpt_dir)
    return [LoraSetting(_RELIGHTING_KEY, path, 1.0, None), *given]


def list_given_loras(config: LoraSettings) -> list[LoraSetting]:
    """Return the LoRA files that settings name.

    Raises InputError for strengths that are no numbers, or not one for each file.
    """
    return [
        *_pair_strengths("lora", config.lora, config.lora_strength, None),
        *_pair_strengths("lora_high", config.lora_high, config.lora_high_strength, "high"),
        *_pair_strengths("lora_low", config.lora_low, config.lora_low_strength, "low"),
    ]


def _find_relighting_lora(folder: str | None) -> Path:
    """Return the relighting LoRA in a checkpoint's folder, without one in Hugging Face's cache.

    Raises InputError where there is none.
    """
    for name in RELIGHTING_NAMES:
        path = _find_cached_file(name) if folder is None else Path(folder).expanduser() / name
        if path is not None and path.is_file():
            return path
    place = "Hugging Face's cache" if folder is None else f"ckpt_dir={folder}"
    destination = "" if folder is None else " FOLDER"
    raise InputError(
        f"{_RELIGHTING_KEY}=true takes {' or '.join(RELIGHTING_NAMES)} of {RELIGHTING_REPOSITORY}, and "
        f"{place} has none; `python -m launch fetch animate-14B{destination}` downloads it with the "
        "checkpoint, and lora=FILE takes it from elsewhere, without this setting"
    )


def _find_cached_file(name: str) -> Path | None:
    import huggingface_hub  # environment variables can make even its import fail

    path = huggingface_hub.try_to_load_from_cache(RELIGHTING_REPOSITORY, name)
    return Path(path) if isinstance(path, str) else None


def check_experts(settings: Sequence[LoraSetting], *, has_experts: bool) -> None:
    """Raise InputError for a LoRA of one expert where the task has one transformer for all noise."""
    for setting in settings:
        if setting.expert is not None and not has_experts:
            raise InputError(
                f"{setting}: this task has one transformer, not one for each kind of noise; "
                f"use lora={setting.path}"
            )


def _pair_strengths(
    key: str, files: str | None, strength: Any, expert: str | None
) -> list[LoraSetting]:
    paths = [] if files is None else split_files(files)
    strengths = strength if isinstance(strength, list) else [strength] * len(paths)
    for value in strengths if isinstance(strength, list) else [strength]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise InputError(
                f"{key}_strength={strength} is neither a number nor a list of them, "
                "e.g. 0.8 or [0.8,-0.5]"
            )
    if paths and len(strengths) != len(paths):
        raise InputError(
            f"{key}_strength={strength} has {len(strengths)} numbers for {len(paths)} "
            f"file{'' if len(paths) == 1 else 's'} in {key}; give one number, or one for each file"
        )
    return [
        LoraSetting(key, path, float(value), expert)
        for path, value in zip(paths, strengths if paths else [], strict=True)
    ]
