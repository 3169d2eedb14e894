"""Settings over a composed configuration, as Hydra would compose them, in a thousandth of the time; no torch.

Composing reads files and takes 100 ms, which 10,000 jobs cannot wait for. Values go through Hydra's own parser and OmegaConf's own typed
nodes, so they are what a composition makes of them; whatever needs more than that is an `UnplainError`, and is left to Hydra.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache, lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wan_dist.config.arguments import is_text, prepare
from wan_dist.config.schema import RunConfig, leaf_fields
from wan_dist.runtime.errors import InputError

_MISSING = "???"
_MOST_KEPT = 2**14


class UnplainError(ValueError):
    """Only Hydra knows what comes of this setting, or what is wrong with it."""


def is_plain_key(key: str) -> bool:
    """Whether a key changes one value and nothing else, as all but ``task``, which chooses files of defaults, and sections do."""
    return key in leaf_fields() and key != "task"


def override_config(config: RunConfig, settings: Iterable[tuple[str, object, str]]) -> RunConfig:
    """Return the configuration with these settings: key, value, and the two as an argument of the command line.

    Keys are plain ones. Raises UnplainError for what Hydra should look at.
    """
    changes: dict[str, dict[str, Any]] = {}
    try:
        for key, value, argument in settings:
            section, _, leaf = key.rpartition(".")
            is_exact = isinstance(value, str) and is_text(key) and value != _MISSING
            changes.setdefault(section, {})[leaf] = value if is_exact else _convert(argument)
        own = changes.pop("", {})
        sections = [item.name for item in fields(config) if item.name in changes]
        return replace(config, **{name: replace(getattr(config, name), **changes[name]) for name in sections}, **own)
    except (HydraException, OmegaConfBaseException, InputError, TypeError, ValueError) as fault:
        raise UnplainError(str(fault)) from fault


@lru_cache(_MOST_KEPT)
def _convert(argument: str) -> Any:
    """Return the value that a composition would have for this argument."""
    (prepared,) = prepare([argument])
    override = _parser().parse_override(prepared)
    key, value = argument.partition("=")[0], override.value()
    if override.key_or_group != key or override.package is not None or override.is_sweep_override() or value == _MISSING:
        raise UnplainError(argument)
    OmegaConf.update(_schema(), key, value, merge=True)
    found = OmegaConf.select(_schema(), key, throw_on_missing=True)
    return OmegaConf.to_object(found) if isinstance(found, Container) else found


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


@cache
def _schema() -> DictConfig:
    """Return typed nodes by key, whose values are of no matter."""
    return OmegaConf.structured(RunConfig)
