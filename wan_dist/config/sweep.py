"""Sweep of settings (Hydra's ``--multirun``): the values of each setting, and their combinations.

Numbers are read by Hydra's own parser, so ``range(1,4)`` and ``choice(1,2)`` work; settings that are one of
several words split at commas; prompts, file names and ``output.name`` are free text, in which a comma is a
comma. Imports no torch.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from wan_dist.config.arguments import check_setting_key, is_text_key
from wan_dist.config.checks import PATH_KEYS, PROMPT_KEYS
from wan_dist.config.schema import list_settings
from wan_dist.config.settings import GROUP_KEYS
from wan_dist.runtime.errors import InputError

_SWEEP_FLAGS = ("--multirun", "-m")
_FREE_TEXT_KEYS = (*PROMPT_KEYS, *PATH_KEYS, "output.name")
_MAX_COMBINATIONS = 100_000


class Sweep(NamedTuple):
    """The settings that all runs of a sweep share, and those of each."""

    shared_settings: list[str]
    """As on the command line, such as ``seed=3``."""
    combinations: list[dict[str, str]]
    """The values of the other settings, by key, one entry a run."""

    @property
    def first_settings(self) -> list[str]:
        """All settings of the first run."""
        return [
            *self.shared_settings,
            *(f"{key}={value}" for key, value in self.combinations[0].items()),
        ]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for a sweep."""
    return not set(_SWEEP_FLAGS).isdisjoint(arguments)


def parse_sweep(arguments: Sequence[str]) -> Sweep:
    """Return the sweep that the arguments describe.

    Raises InputError for values that cannot be read, for too many combinations, and for ``jobs=FILE`` beside
    a sweep.
    """
    settings = [argument for argument in arguments if argument not in _SWEEP_FLAGS]
    if any(setting.startswith("jobs=") for setting in settings):
        raise InputError(
            "jobs=FILE and --multirun cannot be combined: each is a list of jobs; give one of them"
        )
    shared_settings: list[str] = []
    swept: dict[str, list[str]] = {}
    for setting in settings:
        key, values = setting.partition("=")[0], _read_choices(setting)
        if len(values) > 1:
            swept[key] = values
        else:
            shared_settings.append(f"{key}={values[0]}" if "=" in setting else setting)
    num_combinations = math.prod(map(len, swept.values()))
    if num_combinations > _MAX_COMBINATIONS:
        raise InputError(
            f"--multirun has {num_combinations} combinations; the limit is {_MAX_COMBINATIONS}"
        )
    combinations = [
        dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())
    ]
    return Sweep(shared_settings, combinations)


def _read_choices(setting: str) -> list[str]:
    """Return the values that a setting has in a sweep, in order and each once."""
    key, equals, text = setting.partition("=")
    if not equals or key.startswith("-") or key in _FREE_TEXT_KEYS:
        return [text]
    check_setting_key(key.lstrip("+"))
    if is_text_key(key) or key not in list_settings() or key in GROUP_KEYS:
        values = [value.strip() for value in text.split(",") if value.strip()]
        return list(dict.fromkeys(values)) or [text]
    try:
        override = OverridesParser.create().parse_override(setting)
        if not override.is_sweep_override():
            return [text]
        return list(dict.fromkeys(override.sweep_string_iterator()))
    except HydraException as error:
        raise InputError(f"{setting}: {str(error).splitlines()[0]}") from None
