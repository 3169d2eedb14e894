"""Triton kernels are taken if they work here: without Triton, a C compiler or a GPU that it knows, PyTorch does the same."""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from wan_dist.runtime.errors import first_line
from wan_dist.runtime.log import logger

_TOLERANCE = 1e-2


def tried(name: str, trial: Callable[[ModuleType | None], Tensor]) -> ModuleType | None:
    """Return the module of kernels if it is there and does right, else None, and say why.

    ``trial`` does some work with the kernels, or with PyTorch for None, and returns its result.
    """
    try:
        kernels = importlib.import_module(f"wan_dist.models.kernels.{name}")
    except ImportError:
        return None
    expected = trial(None).float()
    try:
        error = (trial(kernels).float() - expected).norm() / expected.norm()
    except Exception as fault:  # Triton raises its own errors, subprocess', OSError, RuntimeError ...
        logger.warning("kernels   %s do not work here, PyTorch does their work more slowly: %s", name, first_line(fault))
        return None
    if not error < _TOLERANCE:
        logger.warning("kernels   %s are off by %.1e here, PyTorch does their work more slowly", name, error)
        return None
    return kernels


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether this device multiplies matrices of fp8: NVIDIA's from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def block_of(length: int) -> int:
    """Return the length of a block that holds ``length`` values: in Triton a power of two."""
    return 1 << (length - 1).bit_length()
