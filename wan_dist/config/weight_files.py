"""Files of weights that settings name, instead of those of a checkpoint's folder."""

from pathlib import Path

from wan_dist.config.checks import WEIGHT_FILE_KEYS, split_file_list
from wan_dist.config.schema import RunConfig


def list_weight_files(config: RunConfig) -> dict[str, list[Path]]:
    """Return the files by the settings that name them; those of two experts in the order HIGH, LOW."""
    values = {key: getattr(config, key) for key in WEIGHT_FILE_KEYS}
    return {
        key: split_file_list(value) if key == "dit_file" else [Path(value.strip()).expanduser()]
        for key, value in values.items()
        if value is not None
    }
