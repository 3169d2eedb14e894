"""Ending early when asked: on SIGTERM or SIGUSR1 a run finishes its step, keeps what it needs to go on, and ends with code 75."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from wan_dist.environment import read_ranks

CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 25.0
"""Seconds that ranks have for their step after SIGTERM: torchrun and Slurm kill them after 30."""

_SOON = 0.5
"""Seconds between the same signal to several processes of a job."""


class Preempted(BaseException):
    """The run was asked to end early. Not an Exception, as KeyboardInterrupt is none."""


class Preemption:
    """Whether this process was asked to end, and by what."""

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; what comes after the first changes nothing."""
        if self.asked_by is None:
            self.asked_by = signal.Signals(number)
            if not self.deferred:
                raise Preempted(f"stopped by {self.asked_by.name}; the same command goes on")

    def was_asked(self) -> bool:
        """Whether something that failed just now may have been ended by the signal that this process gets as well, if a little later."""
        until = time.monotonic() + _SOON
        while self.asked_by is None and time.monotonic() < until:
            time.sleep(0.02)
        return self.asked_by is not None

    @contextmanager
    def until_asked(self) -> Iterator[None]:
        """Within, a signal is only noted in ``asked_by``."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before


preemption = Preemption()
"""Of this process."""


@contextmanager
def heed_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 are heeded as described above; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    preemption.asked_by = None
    before = {number: signal.signal(number, preemption) for number in _SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_writer = signal.set_wakeup_fd(writer)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_writer)
        os.close(writer)  # ends the thread
        for number, handler in before.items():  # a rank that is ending is told to when another has ended: its code should stand
            signal.signal(number, handler if preemption.asked_by is None else signal.SIG_IGN)


def _watch(reader: int) -> None:
    """End this process where the main thread cannot: after SIGTERM it may be waiting for ever for a rank that is gone."""
    parent, seen = os.getppid(), set()
    while received := os.read(reader, 1):
        seen.add(received[0])
        num_ranks = read_ranks().ranks_per_node
        if received[0] != signal.SIGTERM or num_ranks == 1:
            continue
        timer = threading.Timer(_PATIENCE, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()
        time.sleep(1)  # the main thread notes the signal, unless it waits
        was_asked = signal.SIGUSR1 in seen
        is_left = not was_asked if os.getppid() != parent else _num_ranks_of(parent) < num_ranks
        if is_left and preemption.asked_by is None:
            os._exit(CODE if was_asked else 128 + signal.SIGTERM)
    os.close(reader)


def _num_ranks_of(launcher: int) -> int:
    """Return how many processes of the launcher are alive."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone meanwhile
            continue
        count += int(parent) == launcher and state not in "ZX"
    return count
