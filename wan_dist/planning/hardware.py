"""What memory there is for a run: given on the command line, or found on this machine; no torch.

Of the host's memory the smallest limit counts: what is free, what the control group allows (containers, Slurm), what Slurm gave the job,
and the process's own limit.
"""

import os
import re
import resource
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from wan_dist.runtime.environment import number_of, text_of
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

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
    """Return those of the GPUs, by number and by name, that CUDA_VISIBLE_DEVICES leaves, in its order and by CUDA's rules.

    A list is of numbers, or of names that may be abbreviated (GPU-8f2e), or of MIG devices, of which CUDA takes the first. It ends at the
    first entry that is no such GPU or fits several, which is logged once unless it is meant to hide the rest (-1, NoDevFiles); a GPU
    that is named twice hides all.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [found[key] for key in found if key.isdigit()]
    names = given.strip().split(",")
    kind = next((prefix for prefix in ("GPU-", "MIG-") if names[0].startswith(prefix)), "")
    taken: list[str] = []
    for name in names[:1] if kind == "MIG-" else names:
        key = _key_of(name, kind, found)
        if key is None or key in taken:
            if given.strip() not in ("", "-1", "NoDevFiles", "none", "void") and name.strip() != "-1":
                why = "no GPU here" if key is None else "named twice"
                _warn_once(f"CUDA_VISIBLE_DEVICES={given}: {name.strip()!r} is {why}, and CUDA ignores {'all' if key else 'the rest'}")
            return [] if key else [found[key] for key in taken]
        taken.append(key)
    return [found[key] for key in taken]


def _key_of(name: str, kind: str, found: dict[str, T]) -> str | None:
    """Return the one GPU that an entry of CUDA_VISIBLE_DEVICES names; None if there is none, or several."""
    if kind:
        keys = [key for key in found if name.startswith(kind) and key.startswith(name.rstrip())]
        return keys[0] if len(keys) == 1 else None
    number = re.match(r"\s*\+?([0-9]+)", name)  # as C's strtoul: what follows a number is ignored
    return key if number and (key := str(int(number[1]))) in found else None


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def find_gpus() -> list[tuple[str, int, int]]:
    """Return name, total and free bytes of the GPUs that this process may use, by nvidia-smi; none where there is none."""
    try:
        rows = ask_nvidia_smi("gpu", "index", "uuid", "name", "memory.total", "memory.free")
        found = _mig_devices() if os.environ.get("CUDA_VISIBLE_DEVICES", "").strip().startswith("MIG-") else {}
    except (OSError, subprocess.SubprocessError):
        return []
    for index, uuid, name, total, free in rows:
        if total.isdigit() and free.isdigit():
            found[index] = found[uuid] = (name, int(total) * 2**20, int(free) * 2**20)
    return visible(found)


def _mig_devices() -> dict[str, tuple[str, int, int]]:
    """Return the parts that GPUs are divided into, by UUID, with the memory that their profile's name says."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    parts = re.findall(r"^\s*(MIG \S*?(\d+)gb\S*) .*\(UUID: (MIG-\S+)\)", listed, re.MULTILINE)
    return {uuid: (name, int(size) * 10**9, int(size) * 10**9) for name, size, uuid in parts}


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
    """Return the memory that Slurm gave the job on a node; raises InputError for variables of Slurm that are no amounts."""
    if (size := _slurm_bytes("SLURM_MEM_PER_NODE")) is not None:
        return size or _NO_LIMIT  # 0: all of the node's
    for key, counted_by in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        size, count = _slurm_bytes(key), number_of(counted_by)
        if size and count:
            return size * count
    return _NO_LIMIT


def _slurm_bytes(key: str) -> int | None:
    """Return a variable of Slurm's in bytes: MB, or with a unit as in 64G."""
    if not (text := text_of(key)):
        return None
    if not (match := re.fullmatch(r"(\d{1,12})([KMGT]?)B?", text.upper(), re.ASCII)):
        raise InputError(f"{key}={text} in the environment is not an amount of memory as Slurm writes it (MB); unset {key}")
    return int(match[1]) * 1024 ** (" KMGT".index(match[2]) if match[2] else 2)
