"""The GPU of this rank: its memory, and what identifies it among those of the host."""

import torch

from wan_dist.parallel.mesh import select_local_device
from wan_dist.runtime.environment import read_text_variable


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
