"""All ranks of a run, reached without a collective: shared values and numbers, signs of life, and waits that end where a rank is gone.

A collective waits for its peers up to a fixed time, and fails if one of them is merely slow. Here a rank waits as long as those it waits
for show signs of life, and learns at once of one that has failed.
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
from wan_dist.runtime.environment import Ranks
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption

_BEAT_SECONDS = 1.0
_WATCH_SECONDS = 0.2
_LEAVING_SECONDS = 12.0
"""Without a sign of life, for a rank that others wait for before they end."""
_GONE_SECONDS = 60.0
"""The same, for one that others wait for in a collective."""
_LOOK_SECONDS = 5.0
"""Between two looks for signs of life of a rank."""
_PIECE_BYTES = 2**21
"""Of a value in the store, which takes 8 MiB at most."""
_PATIENCE = 8.0


@dataclass(frozen=True)
class Fault:
    """What went wrong on a rank; ``kind``: what others make of it, see `shared_work`."""

    rank: int
    host: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} (rank {self.rank} on {self.host})"


@dataclass(frozen=True)
class _Work:
    """What ranks do together, and how one that waits in it is woken."""

    key: str
    ranks: Sequence[int]
    wake: Callable[[], object]


class RankError(RuntimeError):
    """Another rank has failed, or is gone; that one says more.

    ``fault``: what it told, None for one that is gone. ``is_final``: it does nothing more in this run, so that nobody else can.
    """

    def __init__(self, message: str, fault: Fault | None = None, *, is_final: bool = True) -> None:
        super().__init__(message)
        self.fault, self.is_final = fault, is_final


_num_teams: Counter[int] = Counter()
"""That a process has formed, by rank: they may share one store, of torchrun's agent, and must not read each other's values."""


class Team:
    """The ranks of a run, from before they plan until the last one has ended.

    ``timeout``: seconds without a sign of life after which a rank that is waited for counts as gone.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.rank, self.num_ranks, self.timeout = ranks.rank, ranks.num_ranks, timeout
        _num_teams[ranks.rank] += 1
        self._store, self._connection = open_stores(ranks, timeout, number=_num_teams[ranks.rank])
        self._num_gathered = 0
        self._work: _Work | None = None
        self._lock = threading.Lock()
        self._beats: dict[int, tuple[int, float, float]] = {}
        """Of other ranks: how many signs of life there were, when the last was seen, and when they were last looked for."""
        self._beats_lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self.put(f"host/{self.rank}", socket.gethostname())
        if self.num_ranks > 1:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def store_of(self, name: str) -> Store:
        """Return a part of the store for process groups, which is never used twice."""
        return PrefixStore(name, self._connection)

    def add(self, key: str, amount: int = 1) -> int:
        """Raise a number that all ranks share, from 0 at first, and return it as it is then."""
        return int(self._store.add(f"number/{key}", amount))

    def decide(self, key: str, proposal: str) -> str:
        """Return what the first of the ranks that call this has proposed."""
        return bytes(self._store.compare_set(f"decided/{key}", "", proposal)).decode()

    def put(self, key: str, value: object) -> None:
        """Set a value, any that can be pickled, once."""
        data = pickle.dumps(value)
        pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
        for number, piece in enumerate(pieces):
            self._store.set(f"value/{key}/{number}", piece)  # type: ignore[arg-type]  # bytes work, and the stubs say str
        self._store.set(f"value/{key}", str(len(pieces)))

    def has(self, key: str) -> bool:
        """Whether a value has been set."""
        return bool(self._store.check([f"value/{key}"]))

    def get(self, key: str) -> Any:
        """Return a value, None if it has not been set."""
        if not self.has(key):
            return None
        pieces = range(int(self._store.get(f"value/{key}")))
        return pickle.loads(b"".join(self._store.get(f"value/{key}/{number}") for number in pieces))

    def gather(self, value: object, what: str) -> list[Any]:
        """Return every rank's value, in the order of ranks; all ranks call it in the same order. ``what`` they come to do, in words."""
        self._num_gathered += 1
        key = f"gathered/{self._num_gathered}"
        self.put(f"{key}/{self.rank}", value)
        for rank in range(self.num_ranks):
            self.wait(lambda rank=rank: self.has(f"{key}/{rank}"), what, [rank])  # type: ignore[misc]
        return [self.get(f"{key}/{rank}") for rank in range(self.num_ranks)]

    def share(self, make: Callable[[], Any], what: str) -> Any:
        """Return what the first rank makes, on all ranks; an error of ``make`` is raised there, see `fail`."""
        self._num_gathered += 1
        key = f"shared/{self._num_gathered}"
        if self.rank == 0:
            value = make()
            if self.num_ranks > 1:
                self.put(key, value)
            return value
        self.wait(lambda: self.has(key), what, [0])
        return self.get(key)

    def wait(
        self, is_done: Callable[[], bool], what: str, ranks: Iterable[int], *, patience: float | None = None, heeds_signals: bool = True
    ) -> None:
        """Wait until ``is_done()``.

        Raises RankError where one of ``ranks`` has failed, or shows no sign of life for ``patience`` seconds, by default the timeout;
        Preempted where this process is asked to end, unless that is to be seen to later.
        """
        pause, begun, said = 0.001, time.monotonic(), _PATIENCE
        awaited = [rank for rank in ranks if rank != self.rank]
        while not is_done():
            self._raise_if_failed(awaited)
            if heeds_signals:
                preemption.stop_if_asked()
            if time.monotonic() - begun > said:
                said *= 4
                self._say(what, awaited)
            if lost := self.find_lost(awaited, self.timeout if patience is None else patience):
                who = ", ".join(f"{rank} on {self.get(f'host/{rank}') or 'an unknown host'}" for rank in lost)
                raise RankError(f"no sign of life from rank {who}, which was waited for to {what}")
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def _say(self, what: str, awaited: list[int]) -> None:
        missing = [rank for rank in awaited if self.get(f"host/{rank}") is None]
        if missing:
            names = ", ".join(map(str, missing))
            logger.warning("waiting for %d of %d ranks (%s) at %s", len(missing), self.num_ranks, names, describe_address())
        else:
            logger.debug("waiting for rank %s to %s", ", ".join(map(str, awaited)), what)

    def find_lost(self, ranks: Iterable[int], seconds: float) -> list[int]:
        """Return those of the ranks that have shown no sign of life for so many seconds, and have not left as they should."""
        lost = []
        with self._beats_lock:
            for rank in ranks:
                now = time.monotonic()
                count, changed, looked = self._beats.get(rank, (-1, now, -_LOOK_SECONDS))
                if now - looked > min(seconds / 2, _LOOK_SECONDS):
                    beats = self.add(f"beat/{rank}", 0)
                    changed = changed if beats == count else now
                    self._beats[rank] = (beats, changed, now)
                if now - changed > seconds and not self.add(f"left/{rank}", 0):
                    lost.append(rank)
        return lost

    def is_told_by_others(self, text: str) -> bool:
        """Whether a lower rank has failed with the same text, or does so in a moment: then that one says it."""
        until = time.monotonic() + 2 * GRACE_SECONDS
        while True:
            faults = [self.get(f"fault/{rank}") for rank in range(self.rank)]
            if any(fault is not None and fault.text == text for fault in faults):
                return True
            if time.monotonic() > until or all(fault is not None for fault in faults):
                return False
            time.sleep(0.02)

    def fail(self, kind: str, text: str) -> None:
        """Tell the others that this rank will do nothing more, and why."""
        self.put(f"fault/{self.rank}", Fault(self.rank, socket.gethostname(), kind, text))
        self.add("faults")

    def _raise_if_failed(self, ranks: Iterable[int]) -> None:
        if self._work is not None and self.add(f"{self._work.key}/faults", 0):
            raise RankError("another rank has failed in what is done together", is_final=False)
        if not self.add("faults", 0):
            return
        for rank in ranks:
            if (fault := self.get(f"fault/{rank}")) is not None:
                raise RankError(str(fault), fault)

    def begin_work(self, key: str, ranks: Sequence[int], wake: Callable[[], object]) -> None:
        """From now on look, in a thread, for a fault of ``ranks`` in the work ``key``, or in the run, and for those that are lost.

        A second after one, while the work goes on, ``wake`` is called: the main thread may be in a collective.
        """
        self._work = _Work(key, ranks, wake)

    def end_work(self) -> None:
        """Look for them no more; a waking that has begun has ended then."""
        with self._lock:
            self._work = None

    def _watch(self) -> None:
        """Give signs of life, and look after the work that goes on."""
        beaten, seen_at, broken = 0.0, 0.0, ""
        while not self._closing.wait(_WATCH_SECONDS):
            now, work = time.monotonic(), self._work
            try:
                if now - beaten > _BEAT_SECONDS:
                    beaten = now
                    self.add(f"beat/{self.rank}")
                    self._pass_on_signal()
                if work is None or work.key == broken or not self._is_broken(work):
                    seen_at = 0.0
                    continue
            except RuntimeError:  # the store is gone, and the rank that has it
                self._wake(work)
                return
            seen_at = seen_at or now
            if now - seen_at > GRACE_SECONDS:
                broken = work.key
                self._wake(work)

    def _pass_on_signal(self) -> None:
        """Have a signal to one rank ask all of them to end: the others would go on with their videos, and it wait for them."""
        if preemption.asked_by is not None:
            if not self.has("asked"):
                self.put("asked", int(preemption.asked_by))
        elif (number := self.get("asked")) is not None:
            preemption.pass_on(number)

    def _is_broken(self, work: "_Work") -> bool:
        """Whether one of the ranks has failed, or is gone without a word."""
        if self.add(f"{work.key}/faults", 0):
            return True
        others = [rank for rank in work.ranks if rank != self.rank]
        if self.add("faults", 0) and any(self.has(f"fault/{rank}") for rank in others):
            return True
        return bool(self.find_lost(others, min(self.timeout, _GONE_SECONDS)))

    def _wake(self, work: "_Work | None") -> None:
        with self._lock:
            if work is not None and self._work is work:
                work.wake()

    def leave(self) -> None:
        """End, when all ranks are about to, or are gone: a rank that ends early may have others ended, or take the store with it."""
        if self._watcher is None:
            return
        try:
            self.add(f"left/{self.rank}")
            staying, pause = [rank for rank in range(self.num_ranks) if rank != self.rank], 0.005
            while staying := [rank for rank in staying if self._is_staying(rank)]:
                time.sleep(pause)
                pause = min(1.5 * pause, 0.5)
            self.add("ended")
            if self.rank == 0:  # it may have the store, which the others ask a last time
                until = time.monotonic() + 2
                while self.add("ended", 0) < self.num_ranks and time.monotonic() < until:
                    time.sleep(0.02)
        except RuntimeError as fault:
            logger.debug("the ranks' store is gone: %s", fault)
        finally:
            self._closing.set()
            self._watcher.join()

    def _is_staying(self, rank: int) -> bool:
        """Whether a rank has not left, nor is lost, nor has never come to a run that was asked to end meanwhile."""
        if self.add(f"left/{rank}", 0) or (preemption.asked_by is not None and self.get(f"host/{rank}") is None):
            return False
        return not self.find_lost([rank], _LEAVING_SECONDS)


GRACE_SECONDS = 1.0
"""In which the other ranks may meet the same error, before what they do together is broken off."""
