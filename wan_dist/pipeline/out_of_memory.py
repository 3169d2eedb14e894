"""Free GPU memory: measured and probed on all ranks, and the fallback when it runs out."""

import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.shared_work import OutOfMemoryOnRankError
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.runtime.log import logger


def free_memory() -> None:
    """Collect garbage, and release what the allocators of GPU and host do not use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _trim_host_heap()


def _trim_host_heap() -> None:
    """Give freed pages of the heap back to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_free_bytes(device: torch.device, axis: Axis, *, budget_gib: float | None = None) -> int:
    """Return the free bytes on the device, of the rank of the axis that has the fewest; 2**62 on a CPU."""
    if device.type != "cuda":
        return 2**62
    available_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if budget_gib is not None:
        available_bytes = min(available_bytes, int(budget_gib * 2**30))
    available_bytes -= torch.cuda.memory_allocated(device)
    return int(all_gather(torch.tensor([available_bytes], device=device), axis).min())


def ensure_ranks_can_allocate(num_bytes: int, device: torch.device, axis: Axis) -> None:
    """Raise OutOfMemoryOnRankError on all ranks of the axis if one cannot allocate so much; not on a CPU."""
    has_memory_by_rank = probe_memory_by_rank(
        lambda: _allocate_bytes(num_bytes, device), device, axis
    )
    if not all(has_memory_by_rank):
        raise OutOfMemoryOnRankError(
            f"rank {has_memory_by_rank.index(False)} of the replica "
            f"has no {num_bytes / 2**30:.1f} GiB left on its GPU"
        )


def probe_memory_by_rank(
    work: Callable[[], object], device: torch.device, axis: Axis
) -> list[bool]:
    """Return for each rank of the axis whether it has memory for ``work``, which each runs alone.

    A rank that ran out of memory between two collectives would leave the others waiting.
    """
    try:
        work()
        has_memory = True
    except torch.OutOfMemoryError:
        has_memory = False
    has_memory_by_rank = all_gather(
        torch.tensor([has_memory], dtype=torch.int32, device=device), axis
    )
    return [bool(value) for value in has_memory_by_rank.flatten().tolist()]


def _allocate_bytes(num_bytes: int, device: torch.device) -> None:
    torch.empty(num_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)


def run_with_fallback(
    strategies: Sequence[VaeStrategy],
    work: Callable[[VaeStrategy], None],
    purpose: str,
    warning_note: str = "",
) -> int:
    """Run ``work`` with the first strategy, after out of memory with the next; returns how many failed.

    Raises torch.OutOfMemoryError after the last one. ``purpose`` and ``warning_note`` are for the warning.
    """
    for index, strategy in enumerate(strategies):
        try:
            work(strategy)
            return index
        except torch.OutOfMemoryError:
            if index == len(strategies) - 1:
                raise
        free_memory()
        logger.warning(
            "%s %s ran out of GPU memory; %strying %s",
            purpose,
            strategy,
            warning_note,
            strategies[index + 1],
        )
    raise ValueError("no strategies are given")
