"""All-to-all between ranks, checked value by value and timed; started by torchrun or srun."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from launch.doctor.findings import FAULT, NOTE, Finding
from wan_dist.parallel.collectives import all_to_all, gather_objects
from wan_dist.parallel.mesh import Axis, open_process_groups, select_local_device
from wan_dist.planning.degrees import Degrees
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.runtime.errors import get_first_line

_LIMIT = 60.0
"""Seconds after which a rank that still waits ends."""
_MESSAGE_SIZES = {"cuda": (2**10, 2**18, 2**24), "cpu": (2**10, 2**18)}
"""Numbers of 4 bytes that a rank sends in one all-to-all, by device type."""
_NUM_REPEATS = 5
_SLOW_GB_PER_SECOND = 20.0
"""GB/s of a rank on one node.

Below it Ulysses' all-to-all is so slow that a rank for each guidance pass (``parallel.cfg=2``) is
faster.
"""
_HANG_ADVICE = (
    "GPUs without working peer access may hang (consumer cards, PCIe, ACS or IOMMU "
    "enabled): try NCCL_P2P_DISABLE=1; between nodes, set the interface: "
    "NCCL_SOCKET_IFNAME=... GLOO_SOCKET_IFNAME=..."
)


def check_exchange(findings: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """Check the all-to-all of all ranks and return all hosts' findings, with each host's name.

    ``findings`` are those of this host. A further entry of a host has the faults of a rank other than its
    first. A rank that waits for more than a minute says so and ends with code 1.
    """
    ranks = read_rank_layout()
    num_ranks, rank = ranks.num_ranks, ranks.rank
    host = socket.gethostname()
    watchdog = threading.Timer(_LIMIT, _exit_on_timeout, (f"rank {rank} on {host}",))
    watchdog.daemon = True
    watchdog.start()
    device = select_local_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with open_process_groups(
            Degrees(ulysses=num_ranks), device, timeout_seconds=2 * _LIMIT
        ) as groups:
            own_findings = [*findings, *_examine_exchange(groups.replica, device)]
            gathered_findings = gather_objects(
                (host, groups.local_rank, own_findings), groups.replica
            )
    except RuntimeError as error:
        message = f"rank {rank} on {host}: {get_first_line(error)}"
        return [(host, [*findings, Finding("exchange", message, FAULT, _HANG_ADVICE)])]
    finally:
        watchdog.cancel()
    faults_by_host = [
        (host_name, [finding for finding in host_findings if finding.verdict == FAULT])
        for host_name, local_rank, host_findings in gathered_findings
        if local_rank
    ]
    return [
        (host_name, host_findings)
        for host_name, local_rank, host_findings in gathered_findings
        if local_rank == 0
    ] + [(host_name, faults) for host_name, faults in faults_by_host if faults]


def _exit_on_timeout(rank_text: str) -> None:
    for line in Finding(
        "exchange", f"{rank_text} waited for more than {_LIMIT:.0f} s", FAULT, _HANG_ADVICE
    ).format_lines():
        sys.stderr.write(line + "\n")
    os._exit(1)


def _examine_exchange(axis: Axis, device: torch.device) -> Iterator[Finding]:
    num_wrong = sum(
        _count_wrong_numbers(size, axis, device)
        for size in _MESSAGE_SIZES[device.type]
        for _ in range(_NUM_REPEATS)
    )
    if num_wrong:
        advice = (
            "peer access between the GPUs corrupts data: "
            "run with NCCL_P2P_DISABLE=1, and update the driver"
        )
        yield Finding(
            "exchange",
            f"{num_wrong} of {_NUM_REPEATS * sum(_MESSAGE_SIZES[device.type])} numbers "
            f"arrived wrong on rank {axis.rank}",
            FAULT,
            advice,
        )
    if any(gather_objects(num_wrong, axis)):
        return
    gb_per_second = min(gather_objects(_measure_rate(axis, device), axis))
    message = (
        f"{axis.size} ranks by {dist.get_backend()}: "
        f"all values correct, {gb_per_second:.1f} GB/s a rank"
    )
    is_one_node = (ranks := read_rank_layout()).ranks_per_node == ranks.num_ranks
    if device.type == "cuda" and is_one_node and gb_per_second < _SLOW_GB_PER_SECOND:
        yield Finding(
            "exchange",
            message,
            NOTE,
            "no NVLink: parallel.cfg=2 sends the least and is planned first; keep it",
        )
    else:
        yield Finding("exchange", message)


def make_pattern(size: int, source_rank: int, target_rank: int, device: torch.device) -> Tensor:
    """Return the numbers (size,), int32, that one rank sends to another; each pair and place has its own."""
    return (
        torch.arange(size, device=device, dtype=torch.int64) * 2654435761
        + source_rank * 1000003
        + target_rank * 7919
    ).to(torch.int32)


def _count_wrong_numbers(size: int, axis: Axis, device: torch.device) -> int:
    numbers_per_rank = max(1, size // axis.size)
    sent_numbers = torch.stack(
        [
            make_pattern(numbers_per_rank, axis.rank, peer_rank, device)
            for peer_rank in range(axis.size)
        ]
    )
    expected_numbers = torch.stack(
        [
            make_pattern(numbers_per_rank, peer_rank, axis.rank, device)
            for peer_rank in range(axis.size)
        ]
    )
    return int((all_to_all(sent_numbers, axis)() != expected_numbers).sum())


def _measure_rate(axis: Axis, device: torch.device) -> float:
    """Return the GB/s that this rank sends to the others, and receives, in an all-to-all."""
    x = torch.zeros(axis.size, _MESSAGE_SIZES[device.type][-1] // axis.size, device=device)
    durations = []
    for _ in range(_NUM_REPEATS):
        _synchronize_device(device)
        start = time.perf_counter()
        all_to_all(x, axis)()
        _synchronize_device(device)
        durations.append(time.perf_counter() - start)
    return x.nbytes * (axis.size - 1) / axis.size / min(durations) / 1e9


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
