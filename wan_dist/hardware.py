"""What memory there is for a run: given on the command line, or found on this machine; no torch.

Of the host's memory the smallest limit counts: what is free, what the control group allows (containers, Slurm), what Slurm gave the job,
and the process's own limit.
"""

import os
import re
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wan_dist.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60

T = TypeVar("T")


@dataclass(frozen=True)
class Hardware:
    """Memory of one rank's GPU and of its node, in bytes that may be used."""

    gpu_bytes: int | None
    """None: there is no GPU, or the run is on the CPU."""
    host_bytes: int
    host_limit: str = "free memory"
    """Which limit it is."""
    has_context: bool = False
    """Whether the GPU's driver has taken its part already."""


def parse_bytes(text: str, key: str) -> int:
    """Return the bytes of text such as 80GB, 24 GiB or 16g, all in powers of 1024 as memory is made; raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])i?b?", text.lower().strip())
    if not match:
        raise InputError(f"{key}={text} is not an amount of memory, e.g. {key}=80GB")
    return int(float(match[1]) * 1024 ** (" kmgt".index(match[2])))


def parse_gpus(text: str) -> tuple[int, int]:
    """Return how many GPUs and the bytes of each, of text such as 8x80GB or 24GB; raises InputError."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x*×]\s*)?(.+)", text.lower())
    assert match is not None
    if match[1] == "0":
        raise InputError(f"gpus={text}: at least one GPU, e.g. gpus=8x80GB")
    return int(match[1] or 1), parse_bytes(match[2], "gpus")


def ask_nvidia_smi(what: str, *fields: str) -> list[list[str]]:
    """Return a row of these fields for each of ``what``: gpu, or compute-apps; memory in MiB.

    Raises OSError where there is no nvidia-smi, and SubprocessError where it fails.
    """
    query = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    return [[field.strip() for field in line.split(",")] for line in told.strip().splitlines()]


def visible(found: dict[str, T]) -> list[T]:
    """Return those of the GPUs, by number and by name, that CUDA_VISIBLE_DEVICES leaves, in its order."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [key for key in found if key.isdigit()] if given is None else [name.strip() for name in given.split(",")]
    return [found[name] for name in names if name in found]


def find_gpus() -> list[tuple[str, int, int]]:
    """Return name, total and free bytes of the GPUs that this process may use, by nvidia-smi; none where there is none."""
    try:
        rows = ask_nvidia_smi("gpu", "index", "uuid", "name", "memory.total", "memory.free")
    except (OSError, subprocess.SubprocessError):
        return []
    found = {}
    for index, uuid, name, total, free in rows:
        if total.isdigit() and free.isdigit():
            found[index] = found[uuid] = (name, int(total) * 2**20, int(free) * 2**20)
    return visible(found)


def find_host() -> tuple[int, str]:
    """Return how many bytes of host memory this process and its like on the node may still take, and which limit that is."""
    limits = {"free memory": _free_memory(), "the control group's limit": _cgroup_room(), "Slurm's limit": _slurm_room()}
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        limits["the process's limit (ulimit -v)"] = soft - _address_space()
    which = min(limits, key=lambda name: limits[name])
    return limits[which], which


def _free_memory() -> int:
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return _NO_LIMIT
    match = re.search(r"MemAvailable:\s*(\d+) kB", told)
    return int(match[1]) * 1024 if match else _NO_LIMIT


def _address_space() -> int:
    """Return the bytes of addresses that this process has taken, which is what the limit counts."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _cgroup_room(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the least room in this process's control group and those around it, version 2 or 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    room = _NO_LIMIT
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            limit, used = (_number_in(place / name) for name in names)
            if limit is not None and limit < _NO_LIMIT:
                room = min(room, limit - (used or 0) + _reclaimable(place))
    return room


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(group: Path) -> int:
    """Return the bytes of files that the group has in memory, which the system takes back when it needs them."""
    try:
        match = re.search(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def _slurm_room() -> int:
    """Return the memory that Slurm gave the job on a node, in MB in its variables."""
    if megabytes := os.environ.get("SLURM_MEM_PER_NODE"):
        return int(megabytes) * 2**20 or _NO_LIMIT
    per_cpu, cpus = os.environ.get("SLURM_MEM_PER_CPU"), os.environ.get("SLURM_CPUS_ON_NODE")
    return int(per_cpu) * int(cpus) * 2**20 if per_cpu and cpus else _NO_LIMIT
