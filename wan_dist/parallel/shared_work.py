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
from torch.distributed import DistError

from wan_dist.parallel.mesh import Groups
from wan_dist.parallel.team import GRACE_SECONDS, Fault, RankError
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.signals import Preempted, preemption

T = TypeVar("T")
_LOST_SECONDS = 20.0
"""Without a sign of life, once something has failed."""
_CUT_OFF_SECONDS = 6.0
"""The same, where a connection has failed: the rank at its other end is gone, most likely."""


class NoRoomError(torch.OutOfMemoryError):
    """A rank has too little memory, and all ranks know."""


def work_together(groups: Groups, work: Callable[[], T], what: str, *, exchanges: bool = True) -> T:
    """Do ``work`` on every rank of the replica, and return what it returns on this one when all have done it.

    Where one fails all raise: that one its own error, the others one that says the same, of the same kind where memory ran out, where the
    input is bad, and after a signal; else RankError. ``what`` they do is for messages. The process groups may be aborted then, and
    models that are sharded over them are of no use any more; they are made anew before the next work that ``exchanges``.
    """
    if groups.replica.size == 1:
        with preemption.heeded():
            return work()
    team, key = groups.team, groups.next_key("work")
    own: BaseException | None = None
    with preemption.noted():
        if exchanges and groups.is_aborted:
            groups.open()
        team.begin_work(key, groups.replica_ranks, lambda: _break_off(groups, key))
        try:
            with preemption.heeded():
                result = work()
        except (Exception, KeyboardInterrupt, Preempted) as error:
            own = error
        try:
            first = _await_end(groups, key, what, own)
        except RuntimeError as error:  # others have left the run, or are gone, or the store is
            if own is None or isinstance(own, RankError) or getattr(error, "fault", None) is not None:
                raise
            raise own from error
    if first is None:
        return result
    if own is not None and (first.rank == team.rank or (first.kind, first.text) == (kind_of(own), text_of(own))):
        raise own
    raise _error_of(first) from own


def _tell(groups: Groups, key: str, error: BaseException) -> None:
    """Put down what went wrong here; the first rank that does so speaks for all."""
    team = groups.team
    team.put(f"{key}/fault/{team.rank}", Fault(team.rank, socket.gethostname(), kind_of(error), text_of(error)))
    if team.add(f"{key}/faults") == 1:
        team.put(f"{key}/first", team.rank)


def _break_off(groups: Groups, key: str) -> None:
    """Abort the process groups, unless it has been decided that every rank has met the same error."""
    if groups.team.decide(key, "anew") == "anew":
        groups.abort()


def _await_end(groups: Groups, key: str, what: str, own: BaseException | None) -> Fault | None:
    """Wait until all ranks have ended the work; returns what the first of those that failed said, None where none did."""
    team, ranks = groups.team, groups.replica_ranks
    team.end_work()
    if own is not None:
        _tell(groups, key, own)
    team.add(f"{key}/ended")

    def have_ended() -> bool:
        return team.add(f"{key}/ended", 0) == len(ranks)

    def has_failed() -> bool:
        return team.has(f"{key}/first")

    team.wait(lambda: have_ended() or has_failed(), what, ranks, heeds_signals=False)
    if not team.add(f"{key}/faults", 0):
        return None
    team.wait(has_failed, what, ranks, heeds_signals=False)
    first: Fault = team.get(f"{key}/fault/{team.get(f'{key}/first')}")
    if _have_all_failed_alike(groups, key, have_ended) and team.decide(key, "alike") == "alike":
        return first
    _break_off(groups, key)
    patience = _CUT_OFF_SECONDS if first.kind == "machine" else _LOST_SECONDS
    team.wait(have_ended, what, ranks, patience=patience, heeds_signals=False)
    return first


def _have_all_failed_alike(groups: Groups, key: str, have_ended: Callable[[], bool]) -> bool:
    """Whether every rank has met the same error by itself, and soon, so that none was left waiting in a collective."""
    team, size = groups.team, groups.replica.size
    until = time.monotonic() + GRACE_SECONDS / 2
    while not have_ended():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    if team.add(f"{key}/faults", 0) < size:
        return False
    faults = [team.get(f"{key}/fault/{rank}") for rank in groups.replica_ranks]
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
    return "machine" if isinstance(error, RankError | DistError) or is_of_machine(error) else "error"


def text_of(error: BaseException) -> str:
    """Return an error's type and first line, of one that is meant for users the line alone."""
    if not isinstance(error, RankError) and (fault := getattr(error, "fault", None)) is not None:
        return str(fault.text)
    line = first_line(error)
    return line if isinstance(error, InputError | Preempted | RankError) else f"{type(error).__name__}: {line}"


def is_of_machine(error: BaseException) -> bool:
    """Whether an error is of the disk or the GPU, not of what was done."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return True
        if any(note.startswith("waiting for rank") for note in getattr(seen, "__notes__", [])):  # of a connection
            return True
        if "No space left" in str(seen) or ("CUDA error" in str(seen) and not isinstance(seen, torch.OutOfMemoryError)):
            return True
        seen = seen.__cause__
    return False


def _error_of(fault: Fault) -> BaseException:
    """Return what a rank raises where another has failed; it has that one's fault."""
    error: BaseException
    if fault.kind == "memory":
        error = NoRoomError(str(fault))
    elif fault.kind == "input":
        error = InputError(fault.text)
    elif fault.kind == "signal":
        error = Preempted(fault.text)
    else:
        return RankError(str(fault), fault, is_final=False)
    vars(error)["fault"] = fault
    return error
