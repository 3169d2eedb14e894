"""Arguments -> `RunConfig`, by Hydra: ``conf/config.yaml``, its groups, and the settings given."""

import os
import sys
from typing import cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wan_dist.config.paths import packaged
from wan_dist.config.schema import RunConfig, register_configs
from wan_dist.runtime.errors import InputError

CONF = packaged("conf", "conf")


def compose(arguments: list[str]) -> RunConfig | None:
    """Return the configuration of these arguments, or None after a flag that only prints, such as ``--cfg job``.

    Raises InputError for what Hydra, OmegaConf or the schema refuse.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    register_configs()
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    sys.argv[1:] = arguments
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(keep)()
        return cast(RunConfig, OmegaConf.to_object(composed[0])) if composed else None
    except (HydraException, OmegaConfBaseException) as fault:
        raise InputError(readable(fault)) from None


def readable(fault: Exception) -> str:
    """Return what Hydra or OmegaConf found wrong, in a line."""
    cause = fault.__cause__ if isinstance(fault.__cause__, OmegaConfBaseException) else fault  # Hydra's own says less
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    what = f"{key}: {lines[0]}" if key else lines[0]
    is_of_several = what.startswith(("Ambiguous value", "Sweep parameters"))  # Hydra's advice is for what is not done here
    return f"{what.partition(' requires')[0]}: a setting takes one value" if is_of_several else what
