"""Dispatch between Triton kernels and PyTorch: the kernels are used if a trial shows that they work.

Without Triton, a C compiler or a GPU that Triton supports, PyTorch computes the same.
"""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from wan_dist.runtime.c_compiler import explain_missing_compiler
from wan_dist.runtime.errors import get_first_line
from wan_dist.runtime.log import logger

_MAX_RELATIVE_ERROR = 1e-2
"""Largest error of a trial's result, relative to PyTorch's, by their norms."""


def load_verified_kernels(
    module_name: str, run_trial: Callable[[ModuleType | None], Tensor]
) -> ModuleType | None:
    """Return the module of kernels if it can be imported and passes a trial, else None.

    ``run_trial`` computes something with the kernels, or with PyTorch for None, and returns the result; the
    two must agree within `_MAX_RELATIVE_ERROR`. Why a trial failed is logged as a warning.
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
            "kernels %s do not work here; using PyTorch, which is slower: %s",
            module_name,
            explain_missing_compiler() or get_first_line(error),
        )
        return None
    if not relative_error < _MAX_RELATIVE_ERROR:
        logger.warning(
            "kernels %s are off by %.1e here; using PyTorch, which is slower",
            module_name,
            relative_error,
        )
        return None
    return kernels


@cache
def supports_fp8_matmul(device: torch.device) -> bool:
    """Whether this device multiplies fp8 matrices: NVIDIA GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def compute_block_size(length: int) -> int:
    """Return the size of a Triton block that holds ``length`` values, which is a power of two."""
    return 1 << (length - 1).bit_length()
