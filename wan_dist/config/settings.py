"""Declaration of a setting: its default, its help, and what a run's outputs depend on through it.

The effects are the one list from which the digests, the names of results and the reuse of loaded models
follow (`planning/digests.py`, `planning/file_names.py`, `jobs/planned_job.py`).
"""

from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass
from enum import Flag, auto
from typing import Any


class Effect(Flag):
    """What changes with a setting."""

    NOTHING = 0
    """Speed, memory and messages at most; results are the same, up to rounding."""
    WEIGHTS = auto()
    """The weights: it names their files, whose content is in the digest of the weights."""
    MODELS = auto()
    """How models are loaded: videos that differ in it do not share loaded ones."""
    LATENTS = auto()
    """The denoised latents, and with them the result."""
    RESULT = auto()
    """The result made from given latents."""


GROUP_KEYS = ("task", "preset")
"""Settings that choose a file of conf/ with defaults of other settings."""
LOADING = Effect.WEIGHTS | Effect.MODELS
"""What loaded models depend on."""
OUTPUTS = Effect.WEIGHTS | Effect.LATENTS | Effect.RESULT
"""What a run's files depend on."""
ALL_EFFECTS = Effect.MODELS | Effect.LATENTS | Effect.RESULT

SettingValues = Mapping[str, Any]
"""Values of settings by dotted key."""


def add_setting(
    default: Any, text: str, effect: Effect = Effect.NOTHING, *, is_new: bool = False
) -> Any:
    """Return the dataclass field of a setting, with its help and its effect.

    ``is_new``: digests and names leave it out while it has its default, so that they stay those of versions
    which did not have it.
    """
    return field(default=default, metadata={"help": text, "effect": effect, "is_new": is_new})


def collect_settings(schema: type, prefix: str = "") -> dict[str, Field[Any]]:
    """Return every settable key of a schema, dotted, with its dataclass field."""
    settings: dict[str, Field[Any]] = {}
    for config_field in fields(schema):
        if isinstance(config_field.type, type) and is_dataclass(config_field.type):
            settings |= collect_settings(config_field.type, f"{prefix}{config_field.name}.")
        else:
            settings[prefix + config_field.name] = config_field
    return settings
