"""Ending early when asked: on SIGINT, SIGTERM, SIGHUP or SIGUSR1 a run finishes its step, keeps what it needs to go on, and ends with 75.

A second SIGINT or SIGTERM ends it at once. A signal that was ignored when the run started, as nohup ignores SIGHUP, stays so.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from wan_dist.runtime.environment import launched_by, read_ranks
from wan_dist.runtime.log import logger

CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_INSISTING = (signal.SIGINT, signal.SIGTERM)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What torchrun passes on to its ranks; it kills those that are still there after 30 s."""
_PATIENCE = 25.0
"""Seconds that ranks have for their step then; Slurm kills after 30 s too, when it has sent SIGTERM."""
_SOON = 0.5
"""Seconds between the same signal to several processes of a job."""
_ECHO_SECONDS = 1.0
"""Within which the same request may come twice: to the process group, and once more from torchrun, `timeout` or a dying parent."""


class Preempted(BaseException):
    """The run was asked to end early. Not an Exception, as KeyboardInterrupt is none."""


class Preemption:
    """Whether this process was asked to end, and by what."""

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.deferred = True
        self.is_at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; what comes after the first changes nothing here, see `_watch`."""
        if self.asked_by is None:
            self.asked_by = signal.Signals(number)
            if self.is_at_once:
                _end_at_once(CODE, f"stopped by {self.asked_by.name}; the same command goes on")
            if not self.deferred:
                self.stop_if_asked()

    def pass_on(self, number: int) -> None:
        """Ask this process to end, since another one of its run was asked by this signal."""
        if self.asked_by is None:
            self.asked_by = signal.Signals(number)

    def forget(self) -> None:
        """Begin anew, in a process that goes on."""
        self.asked_by, self.deferred = None, True

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within, a signal raises Preempted, at once where it came before; outside it is only noted in ``asked_by``."""
        before, self.deferred = self.deferred, False
        try:
            self.stop_if_asked()
            yield
        finally:
            self.deferred = before

    @contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """Within, a signal ends the process at once: nothing is lost then, and what waits for threads of others would wait for long."""
        self.is_at_once = True
        try:
            yield
        finally:
            self.is_at_once = False

    def stop_if_asked(self) -> None:
        """Raise Preempted if this process was asked to end."""
        if self.asked_by is not None:
            raise Preempted(f"stopped by {self.asked_by.name}; the same command goes on")

    def was_asked(self) -> bool:
        """Whether something that failed just now may have been ended by the signal that this process gets as well, if a little later."""
        until = time.monotonic() + _SOON
        while self.asked_by is None and time.monotonic() < until:
            time.sleep(0.02)
        return self.asked_by is not None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, a signal is only noted in ``asked_by``."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    @contextmanager
    def until_asked(self) -> Iterator[None]:
        """Within `heeded`, have a signal only noted; raises Preempted where one came before and was swallowed by a library."""
        self.stop_if_asked()
        with self.noted():
            yield


preemption = Preemption()
"""Of this process."""


def end_when_asked() -> None:
    """Have signals end this process with `CODE` at once: while modules are imported, nothing has begun; `heed_signals` is for later."""
    for number in _heeded():
        signal.signal(number, _end_before_start)


def _end_before_start(number: int, frame: FrameType | None) -> None:
    _end_at_once(CODE, f"stopped by {signal.Signals(number).name} before it began")


def _heeded() -> list[signal.Signals]:
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def heed_signals() -> Iterator[None]:
    """Within, `preemption` takes the signals, in the main thread only.

    After one came they stay so: the process is ending, and its exit code stands whatever else it is told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    preemption.forget()
    before = {number: signal.signal(number, preemption) for number in _heeded()}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        if preemption.asked_by is None:
            signal.set_wakeup_fd(old_writer)
            os.close(writer)  # ends the thread
            for number, handler in before.items():
                signal.signal(number, handler)
        else:
            atexit.register(_ignore_signals)  # the interpreter restores the defaults before its very end


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _watch(reader: int) -> None:
    """Act on signals where the main thread cannot: it may be in a long computation, or wait for ever for a rank that is gone."""
    parent, seen = os.getppid(), set[int]()
    insisted_at: float | None = None
    while received := os.read(reader, 1):
        number, now = received[0], time.monotonic()
        if number not in _SIGNALS:
            continue
        if not seen:
            _after(0.1, _say_what_comes)
        seen.add(number)
        if number in _INSISTING:
            if insisted_at is not None and now - insisted_at > _ECHO_SECONDS:
                _end_at_once(128 + number, f"ended at once: {signal.Signals(number).name} came again")
            insisted_at = now if insisted_at is None else insisted_at
        if number in _FORWARDED and read_ranks().num_ranks > 1:
            if number == signal.SIGTERM or launched_by() == "torchrun":
                _after(_PATIENCE, os._exit, 128 + number)
            _after(1.0, _end_if_left, parent, number, seen)  # the main thread notes the signal meanwhile, unless it waits
    os.close(reader)


def _after(seconds: float, work: Callable[..., object], *arguments: object) -> None:
    timer = threading.Timer(seconds, work, arguments)
    timer.daemon = True
    timer.start()


def _say_what_comes() -> None:
    if preemption.deferred:
        name = "a signal" if preemption.asked_by is None else preemption.asked_by.name
        logger.info("asked     by %s to end: finishes what it is at; SIGINT or SIGTERM again ends at once", name)


def _end_if_left(parent: int, number: int, seen: set[int]) -> None:
    """End this process if its launcher or another of its ranks is gone and the main thread, which waits for it, has noted no signal."""
    was_asked = signal.SIGUSR1 in seen
    is_left = not was_asked if os.getppid() != parent else _num_ranks_of(parent) < read_ranks().ranks_per_node
    if is_left and preemption.asked_by is None:
        os._exit(CODE if was_asked else 128 + number)


def _end_at_once(code: int, message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"wan_dist: {message}\n".encode())
    os._exit(code)


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
