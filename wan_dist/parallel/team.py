"""Coordination of all ranks without collectives: shared values, counters, heartbeats, failure detection.

A collective waits for its peers up to a fixed timeout, and fails if one of them is merely slow. Here a rank
waits as long as its peers send heartbeats, and learns at once of a peer that has failed.
"""

import pickle
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from wan_dist.parallel.rendezvous import describe_address, open_stores
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.errors import get_first_line
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption

GRACE_SECONDS = 1.0
"""Seconds in which the other ranks may meet the same error by themselves, before joint work is aborted."""
_BEAT_SECONDS = 1.0
"""Seconds between two heartbeats of a rank."""
_WATCH_SECONDS = 0.2
"""Seconds between two rounds of the watcher thread."""
_LEAVING_SECONDS = 12.0
"""Seconds without a heartbeat after which the others no longer wait for a rank before they end."""
_GONE_SECONDS = 60.0
"""Seconds without a heartbeat after which a rank that others wait for in a collective counts as lost."""
_SUSPECTED_SECONDS = 3.0
"""The same once a rank of this node is known to have died."""
_BEAT_CHECK_SECONDS = 5.0
"""Seconds, at most, between two checks of a rank's heartbeat."""
_PIECE_BYTES = 2**21
"""Bytes per piece of a value in the store, which takes at most 8 MiB at once."""
_PATIENCE_SECONDS = 8.0
"""Seconds after which a rank that waits for others logs it."""


@dataclass(frozen=True)
class RankFailure:
    """A failure of one rank; ``kind`` says what it means for others, see `shared_work.classify_error`."""

    rank: int
    host: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} (rank {self.rank} on {self.host})"


@dataclass(frozen=True)
class _WatchedWork:
    """Joint work of ``ranks``; ``on_failure`` wakes a rank that waits in it after another has failed."""

    key: str
    ranks: Sequence[int]
    on_failure: Callable[[], object]


class RankError(RuntimeError):
    """Another rank has failed or is lost; that rank's own output says more.

    ``failure``, as the attribute ``fault``, is what the rank published; None if it is lost. ``is_final``: the
    rank does no more work in this run, so that no other rank can.
    """

    def __init__(
        self, message: str, failure: RankFailure | None = None, *, is_final: bool = True
    ) -> None:
        super().__init__(message)
        self.fault, self.is_final = failure, is_final


_num_coordinators: Counter[int] = Counter()
"""Coordinators that this process has created, by rank.

They may share one store, the torchrun agent's, and must not read each other's values.
"""


class Coordinator:
    """Coordination of the ranks of a run, from before they plan until the last one has ended.

    ``timeout_seconds``: without a heartbeat for so long, a rank that others wait for counts as lost.
    """

    def __init__(self, ranks: RankLayout, timeout_seconds: float) -> None:
        self.rank, self.num_ranks, self.timeout_seconds = (
            ranks.rank,
            ranks.num_ranks,
            timeout_seconds,
        )
        _num_coordinators[ranks.rank] += 1
        self._store, self._group_store = open_stores(
            ranks, timeout_seconds, coordinator_number=_num_coordinators[ranks.rank]
        )
        self._num_exchanges = 0
        self._watched_work: _WatchedWork | None = None
        self._work_lock = threading.Lock()
        self._heartbeats: dict[int, tuple[int, float, float]] = {}
        """By rank: the number of heartbeats, when it last changed, and when it was last read."""
        self._heartbeats_lock = threading.Lock()
        self._stop_event = threading.Event()
        self._watcher_thread: threading.Thread | None = None
        self.put(f"host/{self.rank}", socket.gethostname())
        if self.num_ranks > 1:
            self._watcher_thread = threading.Thread(target=self._run_watcher, daemon=True)
            self._watcher_thread.start()

    def make_prefix_store(self, name: str) -> Store:
        """Return the store under a prefix, for process groups; each ``name`` must be used once only."""
        return PrefixStore(name, self._group_store)

    def add_to_counter(self, key: str, amount: int = 1) -> int:
        """Add ``amount`` to a counter that all ranks share, which starts at 0, and return its new value."""
        return int(self._store.add(f"number/{key}", amount))

    def decide_once(self, key: str, proposal: str) -> str:
        """Return the proposal of the first rank that called this with ``key``."""
        return bytes(self._store.compare_set(f"decided/{key}", "", proposal)).decode()

    def put(self, key: str, value: object) -> None:
        """Set a value, which must be picklable; once per key."""
        serialized = pickle.dumps(value)
        pieces = [
            serialized[start : start + _PIECE_BYTES]
            for start in range(0, len(serialized), _PIECE_BYTES)
        ]
        for index, piece in enumerate(pieces):
            self._store.set(f"value/{key}/{index}", piece)  # type: ignore[arg-type]  # bytes work, and the stubs say str
        self._store.set(f"value/{key}", str(len(pieces)))

    def has(self, key: str) -> bool:
        """Whether a value has been set."""
        return bool(self._store.check([f"value/{key}"]))

    def get(self, key: str) -> Any:
        """Return a value, or None if it has not been set."""
        if not self.has(key):
            return None
        pieces = range(int(self._store.get(f"value/{key}")))
        return pickle.loads(b"".join(self._store.get(f"value/{key}/{index}") for index in pieces))

    def gather(self, value: object, purpose: str) -> list[Any]:
        """Return every rank's value, in the order of ranks.

        All ranks must make their calls in the same order. ``purpose`` says in messages what the ranks wait
        to do.
        """
        self._num_exchanges += 1
        key = f"gathered/{self._num_exchanges}"
        self.put(f"{key}/{self.rank}", value)
        for rank in range(self.num_ranks):
            self.wait_until(lambda rank=rank: self.has(f"{key}/{rank}"), purpose, [rank])  # type: ignore[misc]
        return [self.get(f"{key}/{rank}") for rank in range(self.num_ranks)]

    def run_on_first_rank(self, make: Callable[[], Any], purpose: str) -> Any:
        """Return the result of ``make()``, called on the first rank, on all ranks.

        An error of ``make`` is raised on the first rank only; the others learn of it by `announce_failure`.
        """
        self._num_exchanges += 1
        key = f"shared/{self._num_exchanges}"
        if self.rank == 0:
            value = make()
            if self.num_ranks > 1:
                self.put(key, value)
            return value
        self.wait_until(lambda: self.has(key), purpose, [0])
        return self.get(key)

    def wait_until(
        self,
        is_done: Callable[[], bool],
        purpose: str,
        ranks: Iterable[int],
        *,
        patience_seconds: float | None = None,
        is_interruptible: bool = True,
    ) -> None:
        """Wait until ``is_done()``.

        Raises RankError if one of ``ranks`` has failed, or has sent no heartbeat for ``patience_seconds``, by
        default `timeout_seconds`; PreemptionInterrupt if this process is requested to end, unless
        ``is_interruptible`` is false.
        """
        silence_seconds = self.timeout_seconds if patience_seconds is None else patience_seconds
        pause_seconds, start_time, log_after_seconds = 0.001, time.monotonic(), _PATIENCE_SECONDS
        awaited_ranks = [rank for rank in ranks if rank != self.rank]
        while not is_done():
            self._raise_if_failed(awaited_ranks)
            if is_interruptible:
                preemption.raise_if_requested()
            if time.monotonic() - start_time > log_after_seconds:
                log_after_seconds *= 4
                self._log_waiting(purpose, awaited_ranks)
            if lost_ranks := self.find_lost_ranks(awaited_ranks, silence_seconds):
                lost_text = ", ".join(
                    f"{rank} on {self.get(f'host/{rank}') or 'an unknown host'}"
                    for rank in lost_ranks
                )
                raise RankError(
                    f"no heartbeat from rank {lost_text}, which others waited for to {purpose}"
                )
            time.sleep(pause_seconds)
            pause_seconds = min(1.5 * pause_seconds, 0.1)

    def _log_waiting(self, purpose: str, awaited_ranks: list[int]) -> None:
        missing_ranks = [rank for rank in awaited_ranks if self.get(f"host/{rank}") is None]
        if missing_ranks:
            missing_text = ", ".join(map(str, missing_ranks))
            logger.warning(
                "waiting for %d of %d ranks (%s) at %s",
                len(missing_ranks),
                self.num_ranks,
                missing_text,
                describe_address(),
            )
        else:
            logger.debug("waiting for rank %s to %s", ", ".join(map(str, awaited_ranks)), purpose)

    def find_lost_ranks(self, ranks: Iterable[int], silence_seconds: float) -> list[int]:
        """Return the ranks that have sent no heartbeat for ``silence_seconds`` and have not left properly."""
        lost_ranks = []
        with self._heartbeats_lock:
            for rank in ranks:
                now = time.monotonic()
                last_count, changed_at, checked_at = self._heartbeats.get(
                    rank, (-1, now, -_BEAT_CHECK_SECONDS)
                )
                if now - checked_at > min(silence_seconds / 2, _BEAT_CHECK_SECONDS):
                    beat_count = self.add_to_counter(f"beat/{rank}", 0)
                    changed_at = changed_at if beat_count == last_count else now
                    self._heartbeats[rank] = (beat_count, changed_at, now)
                if now - changed_at > silence_seconds and not self.add_to_counter(
                    f"left/{rank}", 0
                ):
                    lost_ranks.append(rank)
        return lost_ranks

    def is_reported_by_lower_rank(self, text: str) -> bool:
        """Whether a lower rank has failed with the same text, which then reports it.

        Waits a moment for lower ranks that are about to fail.
        """
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while True:
            failures = [self.get(f"fault/{rank}") for rank in range(self.rank)]
            if any(failure is not None and failure.text == text for failure in failures):
                return True
            if time.monotonic() > deadline or all(failure is not None for failure in failures):
                return False
            time.sleep(0.02)

    def announce_failure(self, kind: str, text: str) -> None:
        """Tell the other ranks that this rank does no more work, and why."""
        self.put(f"fault/{self.rank}", RankFailure(self.rank, socket.gethostname(), kind, text))
        self.add_to_counter("faults")

    def _raise_if_failed(self, ranks: Iterable[int]) -> None:
        if self._watched_work is not None and self.add_to_counter(
            f"{self._watched_work.key}/faults", 0
        ):
            raise RankError("another rank has failed in joint work", is_final=False)
        if not self.add_to_counter("faults", 0):
            return
        for rank in ranks:
            if (failure := self.get(f"fault/{rank}")) is not None:
                raise RankError(str(failure), failure)

    def start_watching(
        self, key: str, ranks: Sequence[int], on_failure: Callable[[], object]
    ) -> None:
        """Start watching, in a thread, for ranks of the work ``key`` that fail or are lost.

        A rank among ``ranks`` that has failed in the run as a whole counts too. `GRACE_SECONDS` after a
        failure, if the work is still running, ``on_failure`` is called: the main thread may be in a
        collective.
        """
        self._watched_work = _WatchedWork(key, ranks, on_failure)

    def stop_watching(self) -> None:
        """Stop watching; a call of ``on_failure`` that has started has returned by then."""
        with self._work_lock:
            self._watched_work = None

    def _run_watcher(self) -> None:
        """Send heartbeats, relay signals, and check the watched work for failures."""
        last_beat_at, failed_since, handled_key = 0.0, 0.0, ""
        while not self._stop_event.wait(_WATCH_SECONDS):
            now, work = time.monotonic(), self._watched_work
            try:
                if now - last_beat_at > _BEAT_SECONDS:
                    last_beat_at = now
                    self.add_to_counter(f"beat/{self.rank}")
                    self._relay_signal()
                if work is None or work.key == handled_key or not self._has_work_failed(work):
                    failed_since = 0.0
                    continue
            except RuntimeError:  # the store is gone, and the rank that hosts it
                self._call_on_failure(work)
                return
            failed_since = failed_since or now
            if now - failed_since > GRACE_SECONDS:
                handled_key = work.key
                self._call_on_failure(work)

    def _relay_signal(self) -> None:
        """Relay a signal that one rank received to all ranks, which are then requested to end.

        Otherwise the others would continue with their videos, and that rank would wait for them.
        """
        if preemption.requested_by is not None:
            if not self.has("asked"):
                self.put("asked", int(preemption.requested_by))
        elif (signal_number := self.get("asked")) is not None:
            preemption.relay(signal_number)

    def _has_work_failed(self, work: _WatchedWork) -> bool:
        """Whether one of the other ranks has failed, or is lost without having published a failure."""
        if self.add_to_counter(f"{work.key}/faults", 0):
            return True
        other_ranks = [rank for rank in work.ranks if rank != self.rank]
        if self.add_to_counter("faults", 0) and any(
            self.has(f"fault/{rank}") for rank in other_ranks
        ):
            return True
        silence_seconds = _SUSPECTED_SECONDS if preemption.has_lost_peer else _GONE_SECONDS
        return bool(self.find_lost_ranks(other_ranks, min(self.timeout_seconds, silence_seconds)))

    def _call_on_failure(self, work: _WatchedWork | None) -> None:
        with self._work_lock:
            if work is None or self._watched_work is not work:
                return
            try:
                work.on_failure()
            except (
                Exception
            ) as error:  # the heartbeats go on: the others would take this rank for lost
                logger.warning("the process groups could not be aborted: %s", get_first_line(error))

    def leave(self) -> None:
        """Leave the run, once all other ranks are leaving as well or are lost.

        A rank that exits early may cause its launcher to end the others, or take the store with it.
        """
        if self._watcher_thread is None:
            return
        try:
            self.add_to_counter(f"left/{self.rank}")
            staying_ranks, pause_seconds = (
                [rank for rank in range(self.num_ranks) if rank != self.rank],
                0.005,
            )
            while staying_ranks := [rank for rank in staying_ranks if self._is_rank_staying(rank)]:
                time.sleep(pause_seconds)
                pause_seconds = min(1.5 * pause_seconds, 0.5)
            self.add_to_counter("ended")
            if self.rank == 0:  # it may host the store, which the others access a last time
                deadline = time.monotonic() + 2
                while (
                    self.add_to_counter("ended", 0) < self.num_ranks and time.monotonic() < deadline
                ):
                    time.sleep(0.02)
        except RuntimeError as error:
            logger.debug("the ranks' store is gone: %s", error)
        finally:
            self._stop_event.set()
            self._watcher_thread.join()

    def _is_rank_staying(self, rank: int) -> bool:
        """Whether a rank is still in the run: it has neither left nor is lost.

        A rank that never joined is not waited for if the run was requested to end meanwhile.
        """
        if self.add_to_counter(f"left/{rank}", 0) or (
            preemption.requested_by is not None and self.get(f"host/{rank}") is None
        ):
            return False
        return not self.find_lost_ranks([rank], _LEAVING_SECONDS)
