"""The GPUs, their driver and who uses them, by nvidia-smi; no torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import SubprocessError

from launch.doctor.findings import FAULT, NOTE, Finding
from wan_dist.planning.hardware import ask_nvidia_smi, visible
from wan_dist.runtime.errors import first_line

_DEVICES = Path("/dev")
_PROCESSES = Path("/proc")
_ERRORS = "ecc.errors.uncorrected.volatile.total"
_MOST_USED = 0.1
"""Of a GPU's memory by others, above which runs are in trouble."""


def check_gpus() -> Iterator[Finding]:
    """Look at the GPUs that runs would use."""
    try:
        rows = ask_nvidia_smi("gpu", "index", "uuid", "name", "driver_version", "memory.total", "memory.free", _ERRORS)
    except FileNotFoundError:
        yield _without_driver()
        return
    except SubprocessError as fault:
        said = getattr(fault, "stdout", None) or getattr(fault, "stderr", None) or fault
        advice = "restart the machine if its driver was updated (version mismatch), else ask its administrator; nvidia-smi must work first"
        yield Finding("GPUs", f"nvidia-smi fails: {first_line(said)}", FAULT, advice)
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and not visible(_by_name(rows)):
        found = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} leaves none of {len(rows)}"
        yield Finding("GPUs", found, FAULT, "unset CUDA_VISIBLE_DEVICES, or name GPUs that are there")
        return
    for index, _, name, driver, total, free, errors in visible(_by_name(rows)):
        if not total.isdigit() or not free.isdigit():  # of GPUs that share the host's memory
            yield Finding(f"GPU {index}", f"{name}, driver {driver}; nvidia-smi does not say how much memory it has", NOTE)
            continue
        found = f"{name}, {int(free) / 1024:.1f} of {int(total) / 1024:.1f} GiB free, driver {driver}"
        if errors.isdigit() and int(errors):
            advice = "its memory is failing: take another GPU (CUDA_VISIBLE_DEVICES), tell the administrator"
            yield Finding(f"GPU {index}", f"{found}; {errors} uncorrected memory errors", FAULT, advice)
        else:
            yield Finding(f"GPU {index}", found)


def _by_name(rows: list[list[str]]) -> dict[str, list[str]]:
    return {name: row for row in rows for name in (row[0], row[1])}


def _without_driver() -> Finding:
    if any(_DEVICES.glob("nvidia[0-9]*")):
        advice = "install the driver's tools, or in a container start it with --gpus all"
        return Finding("GPUs", "there are device files of NVIDIA's driver, but no nvidia-smi", NOTE, advice)
    return Finding("GPUs", "no NVIDIA GPU is to be seen: runs will be on the CPU, for which only task=toy is small enough", NOTE)


def check_processes() -> Iterator[Finding]:
    """Look at who else uses the GPUs' memory."""
    try:
        gpus = {row[1]: row for row in visible(_by_name(ask_nvidia_smi("gpu", "index", "uuid", "memory.total", "memory.used")))}
        users = ask_nvidia_smi("compute-apps", "gpu_uuid", "pid", "used_memory")
    except (OSError, SubprocessError):
        return
    seen = dict.fromkeys(gpus, 0)
    for uuid, pid, used in users:
        if uuid in gpus and int(pid) != os.getpid():
            size = int(used) if used.isdigit() else 0
            seen[uuid] += size
            yield _of_process(gpus[uuid], int(pid), size)
    for uuid, (index, _, total, used) in gpus.items():
        hidden = int(used) - seen[uuid] if used.isdigit() and total.isdigit() else 0
        if hidden > _MOST_USED * int(total):
            found = f"GPU {index}: {hidden / 1024:.1f} GiB are used by processes that cannot be seen from here (another container, or user)"
            yield Finding("processes", found, FAULT, "take other GPUs with CUDA_VISIBLE_DEVICES, or ask who runs there")


def _of_process(gpu: list[str], pid: int, used: int) -> Finding:
    index, _, total, _ = gpu
    folder = _PROCESSES / str(pid)
    try:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        is_mine = folder.stat().st_uid == os.getuid()
    except (OSError, IndexError):  # in another container
        command, parent, is_mine = "", "", False
    found = f"GPU {index}: process {pid} uses {used / 1024:.1f} GiB" + (f" ({command[:60]})" if command else "")
    verdict = FAULT if total.isdigit() and used > _MOST_USED * int(total) else NOTE
    if is_mine and parent == "1" and "python" in command:
        return Finding("processes", f"{found}; what started it is gone", verdict, f"it is left over from a run of yours: kill {pid}")
    advice = f"if you do not need it: kill {pid}" if is_mine else "take other GPUs with CUDA_VISIBLE_DEVICES, or ask who runs there"
    return Finding("processes", found, verdict, advice)
