"""What memory a device has left, and what is done when it runs out."""

import gc
from collections.abc import Callable, Sequence

import torch

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.shared_work import NoRoomError
from wan_dist.planning.vae_memory import Way
from wan_dist.runtime.log import logger


def free_memory() -> None:
    """Give back to the device what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device, axis: Axis, *, budget_gib: float | None = None) -> int:
    """Return how much memory is left on the device, on the rank of the axis that has the least; a great deal on a CPU."""
    if device.type != "cuda":
        return 2**62
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if budget_gib is not None:
        free = min(free, int(budget_gib * 2**30))
    free -= torch.cuda.memory_allocated(device)
    return int(all_gather(torch.tensor([free], device=device), axis).min())


def make_sure_of_room(num_bytes: int, device: torch.device, axis: Axis) -> None:
    """Raise NoRoomError on every rank of the axis if one of them could not allocate so much now; nothing on a CPU."""
    have_room = ranks_that_can(lambda: _allocate(num_bytes, device), device, axis)
    if not all(have_room):
        raise NoRoomError(f"rank {have_room.index(False)} of the replica has no {num_bytes / 2**30:.1f} GiB left on its GPU")


def ranks_that_can(work: Callable[[], object], device: torch.device, axis: Axis) -> list[bool]:
    """Return for each rank of the axis whether it has memory to do ``work``, which each tries alone.

    A rank that ran out of memory in the middle of what they do together would leave the others waiting.
    """
    try:
        work()
        can = True
    except torch.OutOfMemoryError:
        can = False
    found = all_gather(torch.tensor([can], dtype=torch.int32, device=device), axis)
    return [bool(value) for value in found.flatten().tolist()]


def _allocate(num_bytes: int, device: torch.device) -> None:
    torch.empty(num_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)


def first_that_works(ways: Sequence[Way], work: Callable[[Way], None], what: str, note: str = "") -> int:
    """Do ``work`` in the first of the ways, and in the next one where memory ran out; returns how often it did.

    Raises torch.OutOfMemoryError after the last. ``what`` and ``note`` are for the warning.
    """
    for number, way in enumerate(ways):
        try:
            work(way)
            return number
        except torch.OutOfMemoryError:
            if number == len(ways) - 1:
                raise
        free_memory()
        logger.warning("%s %s ran out of GPU memory; %strying %s", what, way, note, ways[number + 1])
    raise ValueError("there are no ways")
