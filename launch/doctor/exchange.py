"""What ranks send to each other, checked value by value, and how fast; started by torchrun or srun."""

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
from wan_dist.parallel.mesh import Axis, local_device, open_groups
from wan_dist.planning.degrees import Degrees
from wan_dist.runtime.environment import read_ranks
from wan_dist.runtime.errors import first_line

_LIMIT = 60.0
_SIZES = {"cuda": (2**10, 2**18, 2**24), "cpu": (2**10, 2**18)}
"""Numbers of 4 bytes that a rank sends in all."""
_TIMES = 5
_SLOW = 20.0
"""GB/s on one node, below which GPUs trade heads so slowly that two passes of guidance side by side are the better half."""
_HANGS = (
    "GPUs that cannot reach each other's memory may wait for ever (consumer cards, PCIe, ACS or IOMMU switched on): "
    "try again with NCCL_P2P_DISABLE=1; between nodes, name the interface: NCCL_SOCKET_IFNAME=... GLOO_SOCKET_IFNAME=..."
)


def check_exchange(found: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """Check the exchange and return what all hosts found, each host once, by its name; ``found``: what this one found by itself.

    A rank that waits for more than a minute says so and ends with code 1.
    """
    ranks = read_ranks()
    num_ranks, rank = ranks.num_ranks, ranks.rank
    host = socket.gethostname()
    giving_up = threading.Timer(_LIMIT, _give_up, (f"rank {rank} on {host}",))
    giving_up.daemon = True
    giving_up.start()
    device = local_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with open_groups(Degrees(ulysses=num_ranks), device, timeout=2 * _LIMIT) as groups:
            mine = [*found, *_findings(groups.replica, device)]
            told = gather_objects((host, groups.local_rank, mine), groups.replica)
    except RuntimeError as fault:
        return [(host, [*found, Finding("exchange", f"rank {rank} on {host}: {first_line(fault)}", FAULT, _HANGS)])]
    finally:
        giving_up.cancel()
    wrong = [(where, [one for one in theirs if one.verdict == FAULT]) for where, local, theirs in told if local]
    return [(where, theirs) for where, local, theirs in told if local == 0] + [(where, faults) for where, faults in wrong if faults]


def _give_up(who: str) -> None:
    for line in Finding("exchange", f"{who} has waited for {_LIMIT:.0f} s", FAULT, _HANGS).lines():
        sys.stderr.write(line + "\n")
    os._exit(1)


def _findings(axis: Axis, device: torch.device) -> Iterator[Finding]:
    wrong = sum(_num_wrong(size, axis, device) for size in _SIZES[device.type] for _ in range(_TIMES))
    if wrong:
        advice = "the GPUs' direct path corrupts what is sent: run with NCCL_P2P_DISABLE=1, and update the driver"
        yield Finding(
            "exchange", f"{wrong} of {_TIMES * sum(_SIZES[device.type])} numbers arrived wrong on rank {axis.rank}", FAULT, advice
        )
    if any(gather_objects(wrong, axis)):
        return
    rate = min(gather_objects(_rate(axis, device), axis))
    found = f"{axis.size} ranks by {dist.get_backend()}: all values right, {rate:.1f} GB/s a rank"
    is_one_node = (ranks := read_ranks()).ranks_per_node == ranks.num_ranks
    if device.type == "cuda" and is_one_node and rate < _SLOW:
        yield Finding("exchange", found, NOTE, "without NVLink: parallel.cfg=2, which sends least, is taken first; keep it")
    else:
        yield Finding("exchange", found)


def pattern(size: int, source: int, target: int, device: torch.device) -> Tensor:
    """Return the numbers (size,), int32, that one rank sends to another, different for each pair and place."""
    return (torch.arange(size, device=device, dtype=torch.int64) * 2654435761 + source * 1000003 + target * 7919).to(torch.int32)


def _num_wrong(size: int, axis: Axis, device: torch.device) -> int:
    share = max(1, size // axis.size)
    sent = torch.stack([pattern(share, axis.rank, other, device) for other in range(axis.size)])
    wanted = torch.stack([pattern(share, other, axis.rank, device) for other in range(axis.size)])
    return int((all_to_all(sent, axis)() != wanted).sum())


def _rate(axis: Axis, device: torch.device) -> float:
    """Return how many GB a second this rank sends to the others, and receives."""
    x = torch.zeros(axis.size, _SIZES[device.type][-1] // axis.size, device=device)
    seconds = []
    for _ in range(_TIMES):
        _wait(device)
        start = time.perf_counter()
        all_to_all(x, axis)()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return x.nbytes * (axis.size - 1) / axis.size / min(seconds) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
