"""Machine checks besides the GPUs, without torch: memory, limits, environment variables, networks."""

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.findings import FAULT, NOTE, Finding
from wan_dist.planning.hardware import find_gpus, find_host_memory
from wan_dist.runtime.network import (
    get_ipv4_address,
    list_infiniband_devices,
    list_network_interfaces,
)

GIB = 2**30
_SHARED_MEMORY_FOLDER = Path("/dev/shm")
_MIN_SHARED_BYTES = 1 * GIB
_MIN_HOST_BYTES = 16 * GIB
_MIN_OPEN_FILES = 1024


def check_system() -> Iterator[Finding]:
    """Check the operating system."""
    message = (
        f"{socket.gethostname()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    if sys.platform != "linux":
        yield Finding("system", message, FAULT, "several ranks need Linux; use WSL2 on Windows")
    else:
        yield Finding("system", message)


def check_host_memory() -> Iterator[Finding]:
    """Check the host memory that a run may take, and the shared memory of the ranks (/dev/shm)."""
    host_bytes, host_limit = find_host_memory()
    num_gpus = len(find_gpus())
    message = f"{host_bytes / GIB:.1f} GiB available: {host_limit}"
    if host_bytes < _MIN_HOST_BYTES and num_gpus:
        advice = "python -m launch plan task=... prints what a run needs"
        if "Slurm" in host_limit:
            advice += "; request more with --mem"
        yield Finding("host memory", message, NOTE, advice)
    else:
        yield Finding("host memory", message)
    if not _SHARED_MEMORY_FOLDER.is_dir():
        return
    usage = shutil.disk_usage(_SHARED_MEMORY_FOLDER)
    message = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < _MIN_SHARED_BYTES and num_gpus != 1:
        advice = (
            "several ranks may end with a bus error: "
            "start the container with --shm-size=16g or --ipc=host, or delete files in /dev/shm"
        )
        yield Finding("/dev/shm", message, FAULT if num_gpus else NOTE, advice)
    else:
        yield Finding("/dev/shm", message)


def check_limits() -> Iterator[Finding]:
    """Check the process's limits on open files and on locked memory."""
    max_open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if max_open_files < _MIN_OPEN_FILES:
        yield Finding(
            "limits",
            f"the limit is {max_open_files} open files",
            NOTE,
            f"ulimit -n {_MIN_OPEN_FILES}, or more",
        )
    max_locked_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if list_infiniband_devices() and max_locked_bytes != resource.RLIM_INFINITY:
        message = (
            f"{max_locked_bytes // 2**20} MiB is the limit of locked memory, and InfiniBand is used"
        )
        yield Finding("limits", message, NOTE, "between nodes NCCL may need ulimit -l unlimited")


def check_variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check the environment variables that slow runs down or make them fail."""
    for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "cudaMallocAsync" in environment.get(key, ""):
            advice = (
                f"unset {key}: with this allocator several ranks run out of memory in collectives"
            )
            yield Finding("variables", f"{key}={environment[key]}", FAULT, advice)
    cost_by_variable = {
        "CUDA_LAUNCH_BLOCKING": "waits for every kernel: slow",
        "NCCL_P2P_DISABLE": "GPUs send through host memory: slow if they have peer access",
        "NCCL_SHM_DISABLE": "ranks of a node send over the network: slow",
        "NCCL_IB_DISABLE": "nodes do not use InfiniBand: slow if they have it",
        "HF_HUB_OFFLINE": "no downloads: set ckpt_dir, or have the checkpoint in the cache",
    }
    for key, cost in cost_by_variable.items():
        if environment.get(key, "0") not in ("0", ""):
            yield Finding(
                "variables",
                f"{key}={environment[key]}: {cost}",
                NOTE,
                f"unset {key}, unless it is intended",
            )
    if ffmpeg_path := environment.get("IMAGEIO_FFMPEG_EXE"):
        yield Finding(
            "variables",
            f"IMAGEIO_FFMPEG_EXE={ffmpeg_path} is used "
            "instead of the ffmpeg in the package imageio-ffmpeg",
            NOTE,
        )


def check_network() -> Iterator[Finding]:
    """Check the network interfaces to other nodes."""
    addresses = [f"{name} {get_ipv4_address(name)}" for name in list_network_interfaces()]
    infiniband_text = ", ".join(list_infiniband_devices())
    message = ", ".join(addresses) or "no network interface to other machines"
    if infiniband_text:
        message += f"; InfiniBand or RoCE: {infiniband_text}"
    yield Finding("network", message)
