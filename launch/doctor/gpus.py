"""GPU checks by nvidia-smi, without torch: driver, free memory, memory errors and other processes."""

import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import SubprocessError

from launch.doctor.findings import FAULT, NOTE, Finding
from wan_dist.planning.hardware import filter_visible_gpus, query_nvidia_smi
from wan_dist.runtime.errors import get_first_line

_DEVICE_FOLDER = Path("/dev")
_PROCESS_FOLDER = Path("/proc")
_ECC_ERRORS_FIELD = "ecc.errors.uncorrected.volatile.total"
_MAX_USED_FRACTION = 0.1
"""Fraction of a GPU's memory used by other processes, above which runs may fail."""


def check_gpus() -> Iterator[Finding]:
    """Check the GPUs that runs would use."""
    try:
        rows = query_nvidia_smi(
            "gpu",
            "index",
            "uuid",
            "name",
            "driver_version",
            "memory.total",
            "memory.free",
            _ECC_ERRORS_FIELD,
        )
    except FileNotFoundError:
        yield _report_missing_driver()
        return
    except SubprocessError as error:
        output = getattr(error, "stdout", None) or getattr(error, "stderr", None) or error
        advice = (
            "restart the machine if its driver was updated (version mismatch), "
            "else ask its administrator; nvidia-smi must work first"
        )
        yield Finding("GPUs", f"nvidia-smi fails: {get_first_line(output)}", FAULT, advice)
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and not filter_visible_gpus(
        _index_by_name(rows)
    ):
        setting = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        message = f"{setting} selects none of the {len(rows)} GPUs"
        yield Finding("GPUs", message, FAULT, "unset CUDA_VISIBLE_DEVICES, or list existing GPUs")
        return
    for index, _, name, driver, total, free, num_errors in filter_visible_gpus(
        _index_by_name(rows)
    ):
        if not total.isdigit() or not free.isdigit():  # GPUs that share the host's memory
            yield Finding(
                f"GPU {index}",
                f"{name}, driver {driver}; nvidia-smi does not report its memory",
                NOTE,
            )
            continue
        message = (
            f"{name}, {int(free) / 1024:.1f} of {int(total) / 1024:.1f} GiB free, driver {driver}"
        )
        if num_errors.isdigit() and int(num_errors):
            advice = "its memory is failing: use another (CUDA_VISIBLE_DEVICES), and tell the administrator"
            yield Finding(
                f"GPU {index}", f"{message}; {num_errors} uncorrected memory errors", FAULT, advice
            )
        else:
            yield Finding(f"GPU {index}", message)


def _index_by_name(rows: list[list[str]]) -> dict[str, list[str]]:
    return {name: row for row in rows for name in (row[0], row[1])}


def _report_missing_driver() -> Finding:
    if any(_DEVICE_FOLDER.glob("nvidia[0-9]*")):
        advice = "install the driver's tools, or in a container start it with --gpus all"
        return Finding(
            "GPUs", "device files of NVIDIA's driver found, but no nvidia-smi", NOTE, advice
        )
    return Finding(
        "GPUs",
        "no NVIDIA GPU found: runs use the CPU, for which only task=toy is small enough",
        NOTE,
    )


def check_processes() -> Iterator[Finding]:
    """Check which other processes use the GPUs' memory."""
    try:
        gpu_rows = {
            row[1]: row
            for row in filter_visible_gpus(
                _index_by_name(
                    query_nvidia_smi("gpu", "index", "uuid", "memory.total", "memory.used")
                )
            )
        }
        process_rows = query_nvidia_smi("compute-apps", "gpu_uuid", "pid", "used_memory")
    except (OSError, SubprocessError):
        return
    visible_mib = dict.fromkeys(gpu_rows, 0)
    for uuid, pid, used in process_rows:
        if uuid in gpu_rows and int(pid) != os.getpid():
            used_mib = int(used) if used.isdigit() else 0
            visible_mib[uuid] += used_mib
            yield _report_process(gpu_rows[uuid], int(pid), used_mib)
    for uuid, (index, _, total, used) in gpu_rows.items():
        hidden_mib = int(used) - visible_mib[uuid] if used.isdigit() and total.isdigit() else 0
        if hidden_mib > _MAX_USED_FRACTION * int(total):
            message = (
                f"GPU {index}: {hidden_mib / 1024:.1f} GiB are used by processes "
                "that are not visible here (of another container or user)"
            )
            yield Finding(
                "processes",
                message,
                FAULT,
                "use other GPUs with CUDA_VISIBLE_DEVICES, or ask who uses them",
            )


def _report_process(gpu_row: list[str], pid: int, used_mib: int) -> Finding:
    index, _, total, _ = gpu_row
    process_folder = _PROCESS_FOLDER / str(pid)
    try:
        command = (
            (process_folder / "cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
        parent = (process_folder / "stat").read_text().rpartition(")")[2].split()[1]
        is_mine = process_folder.stat().st_uid == os.getuid()
    except (OSError, IndexError):  # in another container
        command, parent, is_mine = "", "", False
    message = f"GPU {index}: process {pid} uses {used_mib / 1024:.1f} GiB" + (
        f" ({command[:60]})" if command else ""
    )
    verdict = FAULT if total.isdigit() and used_mib > _MAX_USED_FRACTION * int(total) else NOTE
    if is_mine and parent == "1" and "python" in command:
        return Finding(
            "processes",
            f"{message}; its parent process has ended",
            verdict,
            f"it is left over from one of your runs: kill {pid}",
        )
    advice = (
        f"if you do not need it: kill {pid}"
        if is_mine
        else "use other GPUs with CUDA_VISIBLE_DEVICES, or ask who uses them"
    )
    return Finding("processes", message, verdict, advice)
