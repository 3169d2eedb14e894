"""Files that hold all models of a checkpoint, as ComfyUI saves them for its ``checkpoints`` folder.

Each model's tensors have a prefix, which its parts in files of their own do not have (ComfyUI,
comfy/supported_models.py: ``vae_key_prefix``, ``text_encoder_key_prefix``).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_dist.runtime.errors import InputError
from wan_dist.weights.tensor_file import Shape, TensorFile

_MODELS = {
    "dit_file": ("a transformer", r"model\.diffusion_model\."),
    "t5_file": (
        "a text encoder",
        r"(?:text_encoders|cond_stage_model)\.(?:\w+\.transformer\.|(?=spiece_model$))",
    ),
    "vae_file": ("a VAE", r"(?:vae|first_stage_model)\."),
    "clip_file": ("a CLIP vision tower", r"(?=vision_model\.|visual_projection\.)"),
}
"""By the setting that names a file of the model: what it is, and the prefix of its tensors."""


def select_model(file: TensorFile, path: Path, setting: str) -> TensorFile:
    """Return the part of a file that holds the model of ``setting``, the file itself if it holds one model.

    Raises InputError for a file of several models without this one.
    """
    found_settings = [
        other
        for other, (_, prefix) in _MODELS.items()
        if any(re.match(prefix, name) for name in file.shapes)
    ]
    if len(found_settings) < 2:
        return file
    if setting not in found_settings:
        models = " and ".join(_MODELS[other][0] for other in found_settings)
        settings = ", ".join(f"{other}=" for other in found_settings)
        raise InputError(
            f"{setting}={path} holds {models} in one file, and not {_MODELS[setting][0]}; "
            f"it can be given as {settings}, and {_MODELS[setting][0]} in a file of its own here"
        )
    return _FilePart(file, _MODELS[setting][1])


class _FilePart:
    """The tensors of a file whose names begin with a prefix, without it."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._stored_names = {
            name[match.end() :]: name for name in file.shapes if (match := re.match(prefix, name))
        }
        self.shapes: Mapping[str, Shape] = {
            name: file.shapes[stored] for name, stored in self._stored_names.items()
        }
        self.type_names: Mapping[str, str] = {
            name: file.type_names[stored] for name, stored in self._stored_names.items()
        }
        # ComfyUI describes quantised modules there in JSON, by their names in the file.
        self.metadata: Mapping[str, Any] = {
            key: re.sub(f'"{prefix}', '"', value) if isinstance(value, str) else value
            for key, value in file.metadata.items()
        }
        self.is_mapped = file.is_mapped

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored, on the CPU."""
        return self._file.read(self._stored_names[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor as they are stored, from ``start`` to before ``stop``."""
        return self._file.read_rows(self._stored_names[name], start, stop)
