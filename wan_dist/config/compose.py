"""Configuration composition by Hydra: ``conf/config.yaml``, its groups and arguments give a `RunConfig`."""

import os
import sys
from typing import cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wan_dist.config.paths import find_packaged_folder
from wan_dist.config.schema import RunConfig, register_schema
from wan_dist.runtime.errors import InputError

CONFIG_FOLDER = find_packaged_folder("conf", "conf")


def compose_config(arguments: list[str]) -> RunConfig | None:
    """Return the configuration of these arguments, None after a flag that only prints, such as ``--cfg job``.

    Raises InputError for what Hydra, OmegaConf or the schema refuse.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    register_schema()
    has_flags = any(argument.startswith("-") for argument in arguments)
    try:
        config = _run_hydra_command(arguments) if has_flags else _compose_overrides(arguments)
        return None if config is None else cast(RunConfig, OmegaConf.to_object(config))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain_config_error(error)) from None


def _compose_overrides(overrides: list[str]) -> DictConfig:
    """Return the composed configuration; `hydra.main` composes it twice, first for ``hydra.mode`` alone."""
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("config", overrides)


def _run_hydra_command(arguments: list[str]) -> DictConfig | None:
    """Have Hydra act on arguments with flags of its own; returns None where they only print."""
    composed_configs: list[DictConfig] = []

    def capture_config(config: DictConfig) -> None:
        composed_configs.append(config)

    own_arguments, sys.argv[1:] = sys.argv[1:], arguments
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="config")(
            capture_config
        )()
        return composed_configs[0] if composed_configs else None
    finally:
        sys.argv[1:] = own_arguments


def explain_config_error(error: Exception) -> str:
    """Return in one line what Hydra or OmegaConf found wrong."""
    # Hydra's own error says less than its cause
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next(
        (line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), ""
    )
    message = f"{key}: {lines[0]}" if key else lines[0]
    # Hydra's advice for these is about sweeps, which are not supported here
    is_sweep = message.startswith(("Ambiguous value", "Sweep parameters"))
    return (
        f"{message.partition(' requires')[0]}: a setting takes one value" if is_sweep else message
    )
