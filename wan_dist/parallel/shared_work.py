"""Work that the ranks of a replica do together: where one fails, all fail, within seconds, with its error, and can go on after it.

After an error a rank enters no collective. It tells the store; there the others, or a thread of theirs where they are in a collective,
see it and break off what they do; when all have, the process groups are made anew.
"""

import errno
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from wan_dist.errors import InputError, first_line
from wan_dist.parallel.mesh import Groups
from wan_dist.parallel.team import GRACE_SECONDS, Fault, RankError
from wan_dist.preemption import Preempted, preemption

T = TypeVar("T")
_LOST_SECONDS = 20.0
"""Without a sign of life, once something has failed."""
_STARTED_ANEW = "the process groups cannot be made anew"


class NoRoomError(torch.OutOfMemoryError):
    """A rank has too little memory, and all ranks know."""


def work_together(groups: Groups, work: Callable[[], T], what: str) -> T:
    """Do ``work`` on every rank of the replica, and return what it returns on this one when all have done it.

    Where one fails all raise: that one its own error, the others one that says the same, of the same kind where memory ran out, where the
    input is bad, and after a signal; else RankError. ``what`` they do is for messages. The process groups may be other ones then, and
    models that are sharded over them are of no use any more.
    """
    if groups.replica.size == 1:
        return work()
    team, key = groups.team, groups.next_key("work")
    own: BaseException | None = None
    team.begin_work(key, groups.abort)
    try:
        result = work()
    except (Exception, KeyboardInterrupt, Preempted) as error:
        own = error
    with preemption.noted():
        if own is not None:
            _tell(groups, key, own)
        first = _await_end(groups, key, what)
    if first is None:
        return result
    if own is not None and (first.rank == team.rank or (first.kind, first.text) == (kind_of(own), text_of(own))):
        raise own
    raise _error_of(first) from own


def _tell(groups: Groups, key: str, error: BaseException) -> None:
    team = groups.team
    number = team.add(f"{key}/told")
    team.put(f"{key}/fault/{number}", Fault(team.rank, socket.gethostname(), kind_of(error), text_of(error)))
    team.add(f"{key}/faults")  # last: who sees it finds the fault


def _await_end(groups: Groups, key: str, what: str) -> Fault | None:
    """Wait until all ranks have ended the work; returns what the first of those that failed said, None where none did."""
    team, size = groups.team, groups.replica.size
    team.add(f"{key}/ended")

    def have_ended() -> bool:
        return team.add(f"{key}/ended", 0) == size

    def has_failed() -> bool:
        return bool(team.add(f"{key}/faults", 0))

    team.end_work()
    team.wait(lambda: have_ended() or has_failed(), what, groups.replica_ranks)
    if not has_failed():
        return None
    first = team.get(f"{key}/fault/1")
    assert first is not None
    if _have_all_failed_alike(groups, key):
        return first
    groups.abort()
    try:
        team.wait(have_ended, what, groups.replica_ranks, patience=_LOST_SECONDS)
        groups.open()
    except RuntimeError as error:
        raise RankError(f"{first}; {_STARTED_ANEW}: {first_line(error)}", first) from error
    return first


def _have_all_failed_alike(groups: Groups, key: str) -> bool:
    """Whether every rank has met the same error by itself, so that none was left waiting in a collective."""
    team, size = groups.team, groups.replica.size
    until = time.monotonic() + GRACE_SECONDS / 2
    while team.add(f"{key}/faults", 0) < size:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    faults = [team.get(f"{key}/fault/{number}") for number in range(1, size + 1)]
    return len({(fault.kind, fault.text) for fault in faults}) == 1


def kind_of(error: BaseException) -> str:
    """Return what an error means for others: signal, input, memory, machine (all that is done there would meet it), or error."""
    if isinstance(error, RankError) and error.fault is not None:
        return error.fault.kind
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, Preempted | KeyboardInterrupt):
        return "signal"
    return "machine" if isinstance(error, RankError) or is_of_machine(error) else "error"


def text_of(error: BaseException) -> str:
    """Return an error's type and first line, of one that is meant for users the line alone."""
    line = first_line(error)
    return line if isinstance(error, InputError | Preempted | RankError) else f"{type(error).__name__}: {line}"


def is_of_machine(error: BaseException) -> bool:
    """Whether an error is of the disk or the GPU, not of what was done."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return True
        if "No space left" in str(seen) or ("CUDA error" in str(seen) and not isinstance(seen, torch.OutOfMemoryError)):
            return True
        seen = seen.__cause__
    return False


def _error_of(fault: Fault) -> BaseException:
    """Return what a rank raises where another has failed."""
    if fault.kind == "memory":
        return NoRoomError(str(fault))
    if fault.kind == "input":
        return InputError(fault.text)
    if fault.kind == "signal":
        return Preempted(fault.text)
    return RankError(str(fault), fault)
