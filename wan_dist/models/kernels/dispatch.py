"""Triton kernels are taken if they work here: without Triton, a C compiler or a GPU that it knows, PyTorch does the same."""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from wan_dist.runtime.errors import get_first_line
from wan_dist.runtime.log import logger

_MAX_RELATIVE_ERROR = 1e-2


def load_verified_kernels(
    module_name: str, run_trial: Callable[[ModuleType | None], Tensor]
) -> ModuleType | None:
    """Return the module of kernels if it is there and does right, else None, and say why.

    ``trial`` does some work with the kernels, or with PyTorch for None, and returns its result.
    """
    try:
        kernels = importlib.import_module(f"wan_dist.models.kernels.{module_name}")
    except ImportError:
        return None
    expected = run_trial(None).float()
    try:
        relative_error = (run_trial(kernels).float() - expected).norm() / expected.norm()
    except (
        Exception
    ) as error:  # Triton raises its own errors, subprocess', OSError, RuntimeError ...
        logger.warning(
            "kernels   %s do not work here, PyTorch does their work more slowly: %s",
            module_name,
            get_first_line(error),
        )
        return None
    if not relative_error < _MAX_RELATIVE_ERROR:
        logger.warning(
            "kernels   %s are off by %.1e here, PyTorch does their work more slowly",
            module_name,
            relative_error,
        )
        return None
    return kernels


@cache
def supports_fp8_matmul(device: torch.device) -> bool:
    """Whether this device multiplies matrices of fp8: NVIDIA's from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def compute_block_size(length: int) -> int:
    """Return the length of a block that holds ``length`` values: in Triton a power of two."""
    return 1 << (length - 1).bit_length()
