"""The GPU of this rank: its memory, and what identifies it among those of the host."""

import contextlib
import threading

import torch

from wan_dist.parallel.mesh import select_local_device
from wan_dist.planning.hardware import find_gpus
from wan_dist.runtime.environment import read_text_variable
from wan_dist.runtime.errors import InputError

CUDA_PYTORCH_COMMAND = (
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
)


def check_pytorch_build() -> None:
    """Raise InputError for a PyTorch built for CPUs on a machine with an NVIDIA GPU."""
    if torch.version.cuda or torch.version.hip or not find_gpus():
        return
    raise InputError(
        f"this machine has an NVIDIA GPU, but PyTorch {torch.__version__} is built for CPUs; "
        f"{CUDA_PYTORCH_COMMAND} (docs/install.md), or device=cpu"
    )


def find_gpu_bytes(device_setting: str) -> int | None:
    """Return the memory of this rank's GPU in bytes, None if the run is on the CPU."""
    if device_setting == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(select_local_device("cuda")).total_memory)


def find_gpu_id(device_setting: str) -> str | None:
    """Return the identifier of this rank's GPU on its host, None if the run is on the CPU."""
    if device_setting == "cpu" or not torch.cuda.is_available():
        return None
    visible_device = read_text_variable("CUDA_VISIBLE_DEVICES").partition(",")[0]
    if visible_device.startswith("MIG-"):
        return visible_device
    return str(torch.cuda.get_device_properties(select_local_device("cuda")).uuid)


def create_context_early(device_setting: str) -> None:
    """Begin to create this rank's CUDA context in a thread, as that takes a second without Python.

    What fails there fails again where the GPU is used, and is told there.
    """
    if device_setting == "cpu" or not torch.cuda.is_available():
        return

    def create_context() -> None:
        with contextlib.suppress(Exception):
            torch.zeros(1, device=select_local_device("cuda"))

    threading.Thread(target=create_context, name="cuda-context", daemon=True).start()
