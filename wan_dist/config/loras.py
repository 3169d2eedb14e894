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


def list_loras(config: LoraSettings) -> list[LoraSetting]:
    """Return the LoRA files, those of all transformers first.

    Raises InputError for strengths that are no numbers, or not one for each file.
    """
    return [
        *_pair_strengths("lora", config.lora, config.lora_strength, None),
        *_pair_strengths("lora_high", config.lora_high, config.lora_high_strength, "high"),
        *_pair_strengths("lora_low", config.lora_low, config.lora_low_strength, "low"),
    ]


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
