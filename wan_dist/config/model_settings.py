"""Settings of a run's models: how they are loaded and computed."""

from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.loras import LoraSetting, list_loras
from wan_dist.config.schema import RunConfig
from wan_dist.config.sections import MemoryConfig
from wan_dist.config.weight_files import list_weight_files


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is requested of the models, as far as memory or the record depend on it."""

    dtype: str
    quant: str
    attention: str
    step_cache: str | None
    """easy or tea; None: every step is computed."""
    loras: tuple[LoraSetting, ...]
    memory: MemoryConfig
    transformer_files: tuple[Path, ...] = ()
    """The transformer's files, where they are given."""


def collect_model_settings(config: RunConfig) -> ModelSettings:
    """Return the settings of a run's models."""
    return ModelSettings(
        dtype=config.dtype,
        quant=config.quant,
        attention=config.attention,
        step_cache=config.cache.steps,
        loras=tuple(list_loras(config)),
        memory=config.memory,
        transformer_files=tuple(list_weight_files(config).get("dit_file", [])),
    )
