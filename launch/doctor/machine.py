"""What of a machine matters to runs besides its GPUs: memory, limits, variables, networks; no torch."""

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.findings import FAULT, NOTE, Finding
from wan_dist.planning.hardware import find_gpus, find_host
from wan_dist.runtime.network import address_of, infiniband, interfaces

GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = 1 * GIB
_LEAST_HOST = 16 * GIB
_LEAST_FILES = 1024


def check_system() -> Iterator[Finding]:
    """Look at the operating system."""
    found = f"{socket.gethostname()}, {platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    if sys.platform != "linux":
        yield Finding("system", found, FAULT, "several ranks need Linux; on Windows use WSL2")
    else:
        yield Finding("system", found)


def check_host_memory() -> Iterator[Finding]:
    """Look at how much memory a run may take of the host, and of what ranks share."""
    size, limit = find_host()
    num_gpus = len(find_gpus())
    found = f"{size / GIB:.1f} GiB may be taken: {limit}"
    if size < _LEAST_HOST and num_gpus:
        advice = "python -m launch plan task=... says what a run takes" + ("; ask for more with --mem" if "Slurm" in limit else "")
        yield Finding("host memory", found, NOTE, advice)
    else:
        yield Finding("host memory", found)
    if not _SHARED_MEMORY.is_dir():
        return
    usage = shutil.disk_usage(_SHARED_MEMORY)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < _LEAST_SHARED and num_gpus != 1:
        advice = "several ranks may end with a bus error: start the container with --shm-size=16g or --ipc=host, or clear out /dev/shm"
        yield Finding("/dev/shm", found, FAULT if num_gpus else NOTE, advice)
    else:
        yield Finding("/dev/shm", found)


def check_limits() -> Iterator[Finding]:
    """Look at the process's limits."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _LEAST_FILES:
        yield Finding("limits", f"only {files} files may be open", NOTE, f"ulimit -n {_LEAST_FILES}, or more")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if infiniband() and locked != resource.RLIM_INFINITY:
        found = f"{locked // 2**20} MiB of memory may be locked, and there is InfiniBand"
        yield Finding("limits", found, NOTE, "between nodes NCCL may need ulimit -l unlimited")


def check_variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at what is set in the environment and changes how runs go."""
    for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "cudaMallocAsync" in environment.get(key, ""):
            advice = f"unset {key}: with this allocator several ranks run out of memory in their exchanges"
            yield Finding("variables", f"{key}={environment[key]}", FAULT, advice)
    costs = {
        "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: slow",
        "NCCL_P2P_DISABLE": "GPUs send through host memory: slow where they could reach each other",
        "NCCL_SHM_DISABLE": "ranks of a node send through the network: slow",
        "NCCL_IB_DISABLE": "nodes do not use InfiniBand: slow where there is some",
        "HF_HUB_OFFLINE": "nothing can be downloaded: ckpt_dir must be given, or be in the cache",
    }
    for key, cost in costs.items():
        if environment.get(key, "0") not in ("0", ""):
            yield Finding("variables", f"{key}={environment[key]}: {cost}", NOTE, f"unset {key} unless it is meant")
    if path := environment.get("IMAGEIO_FFMPEG_EXE"):
        yield Finding("variables", f"IMAGEIO_FFMPEG_EXE={path} is used instead of the ffmpeg that the package imageio-ffmpeg brings", NOTE)


def check_network() -> Iterator[Finding]:
    """Look at what leads to other nodes."""
    found = [f"{name} {address_of(name)}" for name in interfaces()]
    fast = ", ".join(infiniband())
    words = (", ".join(found) or "no network to other machines") + (f"; InfiniBand or RoCE: {fast}" if fast else "")
    yield Finding("network", words)
