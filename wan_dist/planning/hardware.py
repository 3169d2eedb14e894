"""Available memory for a run: given on the command line, or detected on this machine; no torch.

Of the host's memory the smallest limit counts: free memory, what the control group allows (containers,
Slurm), what Slurm gave the job, and the process's own limit.
"""

import os
import re
import resource
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from wan_dist.runtime.environment import read_number_variable, read_text_variable
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60

T = TypeVar("T")


@dataclass(frozen=True)
class Hardware:
    """Usable memory of one rank's GPU and of its node, in bytes."""

    gpu_bytes: int | None
    """None: there is no GPU, or the run is on the CPU."""
    host_bytes: int
    host_limit_name: str = "free memory"
    """The limit that ``host_bytes`` is."""
    has_driver_context: bool = False
    """Whether the driver's context is on the GPU already, so that ``gpu_bytes`` is without it."""


def parse_bytes(text: str, key: str) -> int:
    """Return the bytes of text such as 80GB, 24 GiB or 16g; raises InputError.

    All units are powers of 1024, as memory is made.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])i?b?", text.lower().strip())
    if not match:
        raise InputError(f"{key}={text} is not an amount of memory, e.g. {key}=80GB")
    return int(float(match[1]) * 1024 ** (" kmgt".index(match[2])))


def parse_gpus(text: str) -> tuple[int, int]:
    """Return how many GPUs and the bytes of each, of text such as 8x80GB or 24GB; raises InputError."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x*×]\s*)?(.+)", text.lower())
    assert match is not None
    if match[1] == "0":
        raise InputError(f"gpus={text} must be at least one GPU, e.g. gpus=8x80GB")
    return int(match[1] or 1), parse_bytes(match[2], "gpus")


def query_nvidia_smi(query_type: str, *fields: str) -> list[list[str]]:
    """Return a row of these fields for each GPU or each process on one; memory in MiB.

    ``query_type``: gpu, or compute-apps. Raises OSError where there is no nvidia-smi, and SubprocessError
    where it fails.
    """
    command = [
        "nvidia-smi",
        f"--query-{query_type}={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return [[field.strip() for field in line.split(",")] for line in output.strip().splitlines()]


def filter_visible_gpus(gpu_by_key: dict[str, T]) -> list[T]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order and by CUDA's rules.

    ``gpu_by_key`` has the GPUs by index and by UUID. The variable lists indices, or UUIDs that may be
    abbreviated (GPU-8f2e), or MIG devices, of which CUDA takes the first. The list ends at the first entry
    that matches no GPU or several, which is logged once unless it is meant to hide the rest (-1, NoDevFiles);
    a GPU that is named twice hides all.
    """
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible_devices is None:
        return [gpu_by_key[key] for key in gpu_by_key if key.isdigit()]
    entries = visible_devices.strip().split(",")
    uuid_prefix = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    visible_keys: list[str] = []
    for entry in entries[:1] if uuid_prefix == "MIG-" else entries:
        key = _find_gpu_key(entry, uuid_prefix, gpu_by_key)
        if key is None or key in visible_keys:
            if (
                visible_devices.strip() not in ("", "-1", "NoDevFiles", "none", "void")
                and entry.strip() != "-1"
            ):
                reason = "no GPU here" if key is None else "named twice"
                _warn_once(
                    f"CUDA_VISIBLE_DEVICES={visible_devices}: {entry.strip()!r} is {reason}, "
                    f"and CUDA ignores {'all' if key else 'the rest'}"
                )
            return [] if key else [gpu_by_key[key] for key in visible_keys]
        visible_keys.append(key)
    return [gpu_by_key[key] for key in visible_keys]


def _find_gpu_key(entry: str, uuid_prefix: str, gpu_by_key: dict[str, T]) -> str | None:
    """Return the key of the one GPU that an entry of CUDA_VISIBLE_DEVICES names; None if none, or several."""
    if uuid_prefix:
        matching_keys = [
            key
            for key in gpu_by_key
            if entry.startswith(uuid_prefix) and key.startswith(entry.rstrip())
        ]
        return matching_keys[0] if len(matching_keys) == 1 else None
    number = re.match(r"\s*\+?([0-9]+)", entry)  # as C's strtoul: what follows a number is ignored
    return key if number and (key := str(int(number[1]))) in gpu_by_key else None


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def find_gpus() -> list[tuple[str, int, int]]:
    """Return name, total and free bytes of the GPUs visible to this process, from nvidia-smi.

    The list is empty where there is no GPU or nvidia-smi fails.
    """
    try:
        rows = query_nvidia_smi("gpu", "index", "uuid", "name", "memory.total", "memory.free")
        gpu_by_key = (
            _find_mig_devices()
            if os.environ.get("CUDA_VISIBLE_DEVICES", "").strip().startswith("MIG-")
            else {}
        )
    except (OSError, subprocess.SubprocessError):
        return []
    for index, uuid, name, total_mib, free_mib in rows:
        if total_mib.isdigit() and free_mib.isdigit():
            gpu_by_key[index] = gpu_by_key[uuid] = (
                name,
                int(total_mib) * 2**20,
                int(free_mib) * 2**20,
            )
    return filter_visible_gpus(gpu_by_key)


def _find_mig_devices() -> dict[str, tuple[str, int, int]]:
    """Return MIG devices (parts of a GPU) by UUID, with the memory that their profile's name gives."""
    listing = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    devices = re.findall(r"^\s*(MIG \S*?(\d+)gb\S*) .*\(UUID: (MIG-\S+)\)", listing, re.MULTILINE)
    return {
        uuid: (name, int(size_gb) * 10**9, int(size_gb) * 10**9) for name, size_gb, uuid in devices
    }


def find_host_memory() -> tuple[int, str]:
    """Return the host memory in bytes that the run may still take on this node, and the limit's name."""
    bytes_by_limit = {
        "free memory": _read_free_bytes(),
        "the control group's limit": _find_cgroup_bytes(),
        "Slurm's limit": _find_slurm_bytes(),
    }
    address_space_limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space_limit != resource.RLIM_INFINITY:
        bytes_by_limit["the process's limit (ulimit -v)"] = (
            address_space_limit - _read_address_space_bytes()
        )
    limit_name = min(bytes_by_limit, key=lambda name: bytes_by_limit[name])
    return bytes_by_limit[limit_name], limit_name


def _read_free_bytes() -> int:
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return _UNLIMITED_BYTES
    match = re.search(r"MemAvailable:\s*(\d+) kB", meminfo)
    return int(match[1]) * 1024 if match else _UNLIMITED_BYTES


def _read_address_space_bytes() -> int:
    """Return the bytes of this process's address space, which is what the limit (RLIMIT_AS) counts."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _find_cgroup_bytes(
    root: Path = _CGROUP_ROOT, membership_file: Path = Path("/proc/self/cgroup")
) -> int:
    """Return the least memory left in this process's control group and its parents, cgroup version 2 or 1."""
    try:
        lines = membership_file.read_text().splitlines()
    except OSError:
        return _UNLIMITED_BYTES
    available_bytes = _UNLIMITED_BYTES
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        controller_root = root / "memory" if controllers else root
        counter_names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        folder = controller_root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(controller_root):
                break
            limit_bytes, used_bytes = (_read_number(group / name) for name in counter_names)
            if limit_bytes is not None and limit_bytes < _UNLIMITED_BYTES:
                available_bytes = min(
                    available_bytes,
                    limit_bytes - (used_bytes or 0) + _read_reclaimable_bytes(group),
                )
    return available_bytes


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_reclaimable_bytes(group: Path) -> int:
    """Return the bytes of the group's file cache, which the kernel reclaims when it needs memory."""
    try:
        match = re.search(
            r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE
        )
    except OSError:
        return 0
    return int(match[1]) if match else 0


def _find_slurm_bytes() -> int:
    """Return the bytes that Slurm gave the job on a node; raises InputError for malformed variables."""
    if (size_bytes := _read_slurm_bytes("SLURM_MEM_PER_NODE")) is not None:
        return size_bytes or _UNLIMITED_BYTES  # 0: all of the node's
    for key, count_key in (
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        size_bytes, count = _read_slurm_bytes(key), read_number_variable(count_key)
        if size_bytes and count:
            return size_bytes * count
    return _UNLIMITED_BYTES


def _read_slurm_bytes(key: str) -> int | None:
    """Return a Slurm variable in bytes: it is in MB, or has a unit as in 64G; None if it is not set."""
    if not (text := read_text_variable(key)):
        return None
    if not (match := re.fullmatch(r"(\d{1,12})([KMGT]?)B?", text.upper(), re.ASCII)):
        raise InputError(
            f"{key}={text} in the environment is not an amount of memory as Slurm writes it (MB); unset {key}"
        )
    return int(match[1]) * 1024 ** (" KMGT".index(match[2]) if match[2] else 2)
