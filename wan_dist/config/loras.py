"""Settings of LoRA files: which files, for which expert, and how strong each is; no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wan_dist.config.checks import split_file_list
from wan_dist.runtime.errors import InputError

LORA_KEYS = ("lora", "lora_high", "lora_low")
"""Settings that name LoRA files: of all transformers, and of one expert alone."""
EXPERTS = ("high", "low")
"""Experts of the tasks that have two, by the noise that they are for, in the order of their transformers."""


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
    """Return the LoRA files, in the order of `LORA_KEYS`; raises InputError for strengths that do not fit."""
    return [
        *_pair_strengths("lora", config.lora, config.lora_strength, None),
        *_pair_strengths("lora_high", config.lora_high, config.lora_high_strength, "high"),
        *_pair_strengths("lora_low", config.lora_low, config.lora_low_strength, "low"),
    ]


def _pair_strengths(
    key: str, files: str | None, strength: Any, expert: str | None
) -> list[LoraSetting]:
    paths = [] if files is None else split_lora_files(files)
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


def split_lora_files(value: str) -> list[Path]:
    """Return the files of a setting: ``FILE``, ``FILE,FILE`` or ``[FILE,FILE]``, also as a list of JSON."""
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            names = json.loads(text)
        except ValueError:
            names = None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return [Path(name).expanduser() for name in names]
        text = text[1:-1]
    return split_file_list(text)


def format_lora_files(names: Sequence[str]) -> str:
    """Return files as the value of a setting that `split_lora_files` splits into the same."""
    return json.dumps(list(names), ensure_ascii=False)
