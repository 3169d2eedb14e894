"""Tensors of one file in PyTorch's own format; code that it may hold is never run."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.weights.tensor_file import format_first_ten

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module", "model_state")
"""Keys under which training programs store a model's tensors, beside optimizer states and the like."""


class PickleFile:
    """A file of `torch.save`; raises InputError unless it holds a dictionary of plain tensors."""

    metadata: dict[str, Any] = {}  # noqa: RUF012 - the format has none

    def __init__(self, path: Path, *, is_legacy: bool) -> None:
        self.is_mapped = not is_legacy
        self._tensors = _load_tensors(path, is_legacy=is_legacy)
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.type_names = {
            name: _TYPE_NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            for name, value in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor."""
        return self._tensors[name][start:stop]


def _load_tensors(path: Path, *, is_legacy: bool) -> dict[str, Tensor]:
    content = _load_content(path, is_legacy=is_legacy)
    wrapped_tensors = [
        content[key]
        for key in _WRAPPER_KEYS
        if isinstance(content, dict) and _is_tensor_dict(content.get(key))
    ]
    tensors = wrapped_tensors[0] if len(wrapped_tensors) == 1 else content
    if not _is_tensor_dict(tensors):
        raise InputError(f"{path} is not a plain dictionary of tensors")
    if unsupported_names := [
        name
        for name, value in tensors.items()
        if value.layout != torch.strided or value.device.type != "cpu"
    ]:
        raise InputError(
            f"{path} is not a plain dictionary of tensors: "
            f"{format_first_ten(unsupported_names)} is sparse, or without values"
        )
    return tensors


def _load_content(path: Path, *, is_legacy: bool) -> Any:
    try:
        # Opened by descriptor: torch reads every file whose name ends in .safetensors as safetensors.
        with path.open("rb") as file:
            return torch.load(
                f"/proc/self/fd/{file.fileno()}",
                map_location="cpu",
                weights_only=True,
                mmap=not is_legacy,
            )
    except (
        Exception
    ) as error:  # for a damaged file RuntimeError, UnpicklingError, EOFError or ValueError
        if isinstance(error, pickle.UnpicklingError) and (
            global_match := re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(error))
        ):
            reason = (
                f"it holds code, {global_match[1]}, which is not run (weights_only); "
                "use the weights as published"
            )
        elif "TorchScript" in str(error):
            reason = "it is a program of TorchScript; use the weights as published"
        else:
            reason = f"download it again ({get_first_line(error)})"
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; {reason}"
        ) from None


def _is_tensor_dict(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
