"""Files of weights that settings name, instead of those of a checkpoint's folder."""

from pathlib import Path

from wan_dist.config.checks import WEIGHT_FILE_KEYS, split_file_list
from wan_dist.config.loras import list_loras
from wan_dist.config.schema import RunConfig


def list_weight_files(config: RunConfig) -> dict[str, list[Path]]:
    """Return the files by the settings that name them; those of two experts in the order HIGH, LOW."""
    values = {key: getattr(config, key) for key in WEIGHT_FILE_KEYS}
    return {
        key: split_file_list(value) if key == "dit_file" else [Path(value.strip()).expanduser()]
        for key, value in values.items()
        if value is not None
    }


def list_model_files(config: RunConfig) -> list[Path]:
    """Return the LoRAs, the transformer's files and the checkpoint's folder, as far as they are given."""
    files = [lora.path for lora in list_loras(config)]
    files += list_weight_files(config).get("dit_file", [])
    return files if config.ckpt_dir is None else [*files, Path(config.ckpt_dir)]
