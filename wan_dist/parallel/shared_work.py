"""Joint work of a replica's ranks: if one rank fails, all fail with its error within seconds.

After an error a rank enters no collective, but publishes the error in the store. The other ranks see it
there, or a thread of theirs does while they are in a collective, and abort their work. When all have ended,
the ranks can continue: the process groups are recreated before the next work that needs them.
"""

import errno
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed import DistError

from wan_dist.parallel.mesh import ProcessGroups
from wan_dist.parallel.team import GRACE_SECONDS, RankError, RankFailure
from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.signals import PreemptionInterrupt, preemption

T = TypeVar("T")
_LOST_RANK_SECONDS = 20.0
"""Seconds without a heartbeat after which a rank counts as lost, once another has failed."""
_LOST_CONNECTION_SECONDS = 6.0
"""The same after a failure of the machine or a connection: the peer is most likely gone."""


class OutOfMemoryOnRankError(torch.OutOfMemoryError):
    """Another rank has run out of memory; raised on the ranks that have not."""


def run_together(
    groups: ProcessGroups, work: Callable[[], T], purpose: str, *, uses_collectives: bool = True
) -> T:
    """Call ``work`` on every rank of the replica, and return its result on this rank once all have finished.

    If one rank fails, all raise: that rank its own error, the others an error with the same text. Theirs is
    of the same kind if memory ran out, if the input is invalid, and after a signal; otherwise it is a
    RankError. ``purpose`` names the work in messages. After a failure the process groups may be aborted,
    and models sharded over them are unusable; the groups are recreated before the next work that
    ``uses_collectives``.
    """
    if groups.replica.size == 1:
        with preemption.interruptible():
            return work()
    coordinator, key = groups.coordinator, groups.make_next_key("work")
    own_error: BaseException | None = None
    with preemption.deferred():
        if uses_collectives and groups.is_aborted:
            groups.open()
        coordinator.start_watching(key, groups.replica_ranks, lambda: _abort_groups(groups, key))
        try:
            with preemption.interruptible():
                result = work()
        except (Exception, KeyboardInterrupt, PreemptionInterrupt) as error:
            own_error = error
        try:
            first_failure = _wait_for_outcome(groups, key, purpose, own_error)
        except RuntimeError as error:  # other ranks have left the run or are lost, or the store is
            if (
                own_error is None
                or isinstance(own_error, RankError)
                or getattr(error, "fault", None) is not None
            ):
                raise
            raise own_error from error
    if first_failure is None:
        return result
    if own_error is not None and (
        first_failure.rank == coordinator.rank
        or (first_failure.kind, first_failure.text)
        == (classify_error(own_error), describe_error(own_error))
    ):
        raise own_error
    raise _make_error(first_failure) from own_error


def _publish_failure(groups: ProcessGroups, key: str, error: BaseException) -> None:
    """Publish this rank's error in the store; the first rank that does so is the one that all report."""
    coordinator = groups.coordinator
    coordinator.put(
        f"{key}/fault/{coordinator.rank}",
        RankFailure(
            coordinator.rank, socket.gethostname(), classify_error(error), describe_error(error)
        ),
    )
    if coordinator.add_to_counter(f"{key}/faults") == 1:
        coordinator.put(f"{key}/first", coordinator.rank)


def _abort_groups(groups: ProcessGroups, key: str) -> None:
    """Abort the process groups, unless the ranks decided that all have failed with the same error."""
    if groups.coordinator.decide_once(key, "anew") == "anew":
        groups.abort()


def _wait_for_outcome(
    groups: ProcessGroups, key: str, purpose: str, own_error: BaseException | None
) -> RankFailure | None:
    """Wait until all ranks have ended the work; returns the first failure, None if there was none.

    Ranks that do not end by themselves after a failure are woken by aborting the process groups. Raises
    RankError for a rank that is lost.
    """
    coordinator, ranks = groups.coordinator, groups.replica_ranks
    coordinator.stop_watching()
    if own_error is not None:
        _publish_failure(groups, key, own_error)
    coordinator.add_to_counter(f"{key}/ended")

    def have_all_ended() -> bool:
        return coordinator.add_to_counter(f"{key}/ended", 0) == len(ranks)

    def has_any_failed() -> bool:
        return coordinator.has(f"{key}/first")

    coordinator.wait_until(
        lambda: have_all_ended() or has_any_failed(), purpose, ranks, is_interruptible=False
    )
    if not coordinator.add_to_counter(f"{key}/faults", 0):
        return None
    coordinator.wait_until(has_any_failed, purpose, ranks, is_interruptible=False)
    first_failure: RankFailure = coordinator.get(f"{key}/fault/{coordinator.get(f'{key}/first')}")
    if (
        _have_all_failed_alike(groups, key, have_all_ended)
        and coordinator.decide_once(key, "alike") == "alike"
    ):
        return first_failure
    _abort_groups(groups, key)
    patience_seconds = (
        _LOST_CONNECTION_SECONDS if first_failure.kind == "machine" else _LOST_RANK_SECONDS
    )
    coordinator.wait_until(
        have_all_ended, purpose, ranks, patience_seconds=patience_seconds, is_interruptible=False
    )
    return first_failure


def _have_all_failed_alike(
    groups: ProcessGroups, key: str, have_all_ended: Callable[[], bool]
) -> bool:
    """Whether all ranks soon failed with the same error by themselves, so that none waits in a collective."""
    coordinator, num_ranks = groups.coordinator, groups.replica.size
    deadline = time.monotonic() + GRACE_SECONDS / 2
    while not have_all_ended():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    if coordinator.add_to_counter(f"{key}/faults", 0) < num_ranks:
        return False
    failures = [coordinator.get(f"{key}/fault/{rank}") for rank in groups.replica_ranks]
    return len({(failure.kind, failure.text) for failure in failures}) == 1


def classify_error(error: BaseException) -> str:
    """Return the kind of an error, which tells the other ranks what to make of it.

    One of signal, input, memory, machine (any work on that machine would fail with it), or error.
    """
    if isinstance(error, RankError) and error.fault is not None:
        return error.fault.kind
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, PreemptionInterrupt | KeyboardInterrupt):
        return "signal"
    return (
        "machine"
        if isinstance(error, RankError | DistError) or is_machine_error(error)
        else "error"
    )


def describe_error(error: BaseException) -> str:
    """Return an error's type and first line; the line alone for errors that are written for users."""
    if not isinstance(error, RankError) and (failure := getattr(error, "fault", None)) is not None:
        return str(failure.text)
    line = get_first_line(error)
    return (
        line
        if isinstance(error, InputError | PreemptionInterrupt | RankError)
        else f"{type(error).__name__}: {line}"
    )


def is_machine_error(error: BaseException) -> bool:
    """Whether an error is caused by the disk, the GPU or a connection, rather than by the work itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EIO,
        ):
            return True
        # a connection error, see `note_awaited_ranks`
        if any(note.startswith("waiting for rank") for note in getattr(cause, "__notes__", [])):
            return True
        if "No space left" in str(cause) or (
            "CUDA error" in str(cause) and not isinstance(cause, torch.OutOfMemoryError)
        ):
            return True
        cause = cause.__cause__
    return False


def _make_error(failure: RankFailure) -> BaseException:
    """Return the error that a rank raises for another rank's failure, which is its attribute ``fault``."""
    error: BaseException
    if failure.kind == "memory":
        error = OutOfMemoryOnRankError(str(failure))
    elif failure.kind == "input":
        error = InputError(failure.text)
    elif failure.kind == "signal":
        error = PreemptionInterrupt(failure.text)
    else:
        return RankError(str(failure), failure, is_final=False)
    vars(error)["fault"] = failure
    return error
