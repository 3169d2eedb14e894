"""The interface of tensor files of all formats."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Shape = tuple[int, ...]
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types of tensors that are weights as they are, by their names in safetensors."""


class TensorFile(Protocol):
    """One open file: names, shapes and types of its tensors; values are read on request."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors by name."""

    @property
    def type_names(self) -> Mapping[str, str]:
        """Data types by their names in safetensors; of GGUF's blocks, the names in llama.cpp."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata."""

    @property
    def is_mapped(self) -> bool:
        """Whether tensors are views of the file, and not copies in memory."""

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored, on the CPU."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor as they are stored, from ``start`` to before ``stop``."""


def format_first_ten(items: Sequence[str]) -> str:
    """Return the first ten items and how many more there are."""
    remainder = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + remainder
