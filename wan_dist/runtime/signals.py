"""Preemption by signals: a run finishes its step, saves what a resume needs, and exits with code 75.

It does so on SIGINT, SIGTERM, SIGHUP or SIGUSR1. A second SIGINT or SIGTERM ends it at once. A signal that
was ignored when the run started, as nohup ignores SIGHUP, stays ignored.
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

from wan_dist.runtime.environment import detect_launcher, read_rank_layout
from wan_dist.runtime.log import logger

WATCHER_NAME = "signal watcher"
"""Of the thread that acts on signals when the main one cannot."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
CONTINUE_ADVICE = "run the same command again to continue"
"""End of the message of a run that was requested to end."""
_PREEMPTION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_FORCE_EXIT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that torchrun forwards to its ranks; it kills those that are still alive after 30 s."""
_STEP_GRACE_SECONDS = 25.0
"""Seconds that ranks then have to finish their step; Slurm too kills 30 s after SIGTERM."""
_ABANDONED_SECONDS = 8.0
"""Seconds that a rank then has to save its progress, if another one of its node has died."""
_SIGNAL_DELAY_SECONDS = 0.5
"""Seconds within which all processes of a job get the same signal."""
_DUPLICATE_SIGNAL_SECONDS = 1.0
"""Seconds within which the same request may come twice.

It is sent to the process group, and once more by torchrun, `timeout` or a dying parent.
"""


class PreemptionInterrupt(BaseException):
    """The run was requested to end early. Not an Exception, as KeyboardInterrupt is none."""


class Preemption:
    """Request to end this process early: whether there is one, and by which signal."""

    def __init__(self) -> None:
        self.requested_by: signal.Signals | None = None
        self.is_deferred = True
        self.is_immediate = False
        self.has_lost_peer = False
        """Whether a signal came because the launcher or a rank of this node has died.

        On a GPU a collective does not notice that.
        """

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle a signal; those after the first change nothing here, see `_watch_signals`."""
        if self.requested_by is None:
            self.requested_by = signal.Signals(signal_number)
            if self.is_immediate:
                _exit_at_once(EXIT_PREEMPTED, f"{self.describe_request()}; {CONTINUE_ADVICE}")
            if not self.is_deferred:
                self.raise_if_requested()

    def relay(self, signal_number: int) -> None:
        """Request this process to end, because another rank of its run got this signal."""
        if self.requested_by is None:
            self.requested_by = signal.Signals(signal_number)

    def reset(self) -> None:
        """Discard an earlier request, in a process that starts another run."""
        self.requested_by, self.is_deferred, self.has_lost_peer = None, True, False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block, raise PreemptionInterrupt on a signal, and at its start for an earlier one.

        Outside, a signal is only recorded in ``requested_by``.
        """
        was_deferred, self.is_deferred = self.is_deferred, False
        try:
            self.raise_if_requested()
            yield
        finally:
            self.is_deferred = was_deferred

    @contextmanager
    def immediate_exit(self) -> Iterator[None]:
        """Within the block, end the process at once on a signal.

        For places where nothing would be lost, and where an orderly end would wait long for the threads of
        libraries.
        """
        self.is_immediate = True
        try:
            yield
        finally:
            self.is_immediate = False

    def raise_if_requested(self) -> None:
        """Raise PreemptionInterrupt if this process was requested to end."""
        if self.requested_by is not None:
            raise PreemptionInterrupt(f"{self.describe_request()}; {CONTINUE_ADVICE}")

    def describe_request(self) -> str:
        """Return which signal this process has received, or that another rank has received one."""
        if self.requested_by is None:
            return "another rank received a signal"
        return f"received {self.requested_by.name}"

    def wait_for_request(self) -> bool:
        """Wait up to 0.5 s for a signal, and return whether there is one.

        What has failed just now may have been ended by a signal that this process gets a little later.
        """
        deadline = time.monotonic() + _SIGNAL_DELAY_SECONDS
        while self.requested_by is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.requested_by is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, only record a signal in ``requested_by``."""
        was_deferred, self.is_deferred = self.is_deferred, True
        try:
            yield
        finally:
            self.is_deferred = was_deferred

    @contextmanager
    def deferred_after_check(self) -> Iterator[None]:
        """Within `interruptible`, only record a signal in ``requested_by`` for this block.

        Raises PreemptionInterrupt if one came before, whose exception a library has swallowed.
        """
        self.raise_if_requested()
        with self.deferred():
            yield


preemption = Preemption()
"""The request of this process."""


def exit_on_signal() -> None:
    """Have signals end this process at once with `EXIT_PREEMPTED`, until `handle_signals` takes over.

    For the time in which modules are imported, when no work has started.
    """
    for signal_number in _list_handled_signals():
        signal.signal(signal_number, _exit_before_start)


def _exit_before_start(signal_number: int, frame: FrameType | None) -> None:
    _exit_at_once(
        EXIT_PREEMPTED, f"received {signal.Signals(signal_number).name} before the run began"
    )


def _list_handled_signals() -> list[signal.Signals]:
    return [
        signal_number
        for signal_number in _PREEMPTION_SIGNALS
        if signal.getsignal(signal_number) is not signal.SIG_IGN
    ]


@contextmanager
def handle_signals() -> Iterator[None]:
    """Within the block, have `preemption` handle the signals; does nothing outside the main thread.

    After a signal the handlers stay: the process is ending, and a default handler must not change its exit
    code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    preemption.reset()
    previous_handlers = {
        signal_number: signal.signal(signal_number, preemption)
        for signal_number in _list_handled_signals()
    }
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_wakeup_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(
        target=_watch_signals, args=(read_end,), name=WATCHER_NAME, daemon=True
    ).start()
    try:
        yield
    finally:
        if preemption.requested_by is None:
            signal.set_wakeup_fd(previous_wakeup_fd)
            os.close(write_end)  # ends the thread
            for signal_number, handler in previous_handlers.items():
                signal.signal(signal_number, handler)
        else:
            # the interpreter restores the default handlers before its very end
            atexit.register(_ignore_signals)


def _ignore_signals() -> None:
    for signal_number in _PREEMPTION_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)


def _watch_signals(read_end: int) -> None:
    """Act on signals when the main thread cannot: in a long computation, or waiting for a lost rank."""
    parent_pid, seen_signals = os.getppid(), set[int]()
    exit_forced_at: float | None = None
    while received_byte := os.read(read_end, 1):
        signal_number, now = received_byte[0], time.monotonic()
        if signal_number not in _PREEMPTION_SIGNALS:
            continue
        if not seen_signals:
            _schedule_call(0.1, _log_preemption_request)
        seen_signals.add(signal_number)
        if signal_number in _FORCE_EXIT_SIGNALS:
            if exit_forced_at is not None and now - exit_forced_at > _DUPLICATE_SIGNAL_SECONDS:
                _exit_at_once(
                    128 + signal_number,
                    f"received {signal.Signals(signal_number).name} again: ended at once",
                )
            exit_forced_at = now if exit_forced_at is None else exit_forced_at
        if signal_number in _FORWARDED_SIGNALS and read_rank_layout().num_ranks > 1:
            if signal_number == signal.SIGTERM or detect_launcher() == "torchrun":
                _schedule_call(_STEP_GRACE_SECONDS, os._exit, 128 + signal_number)
            # within this second the main thread records the signal, unless it is waiting
            _schedule_call(1.0, _exit_if_abandoned, parent_pid, signal_number, seen_signals)
    os.close(read_end)


def _schedule_call(
    delay_seconds: float, callback: Callable[..., object], *arguments: object
) -> None:
    timer = threading.Timer(delay_seconds, callback, arguments)
    timer.daemon = True
    timer.start()


def _log_preemption_request() -> None:
    if preemption.is_deferred:
        name = "a signal" if preemption.requested_by is None else preemption.requested_by.name
        logger.info(
            "signal    received %s: stops after the current step; a second SIGINT or SIGTERM stops at once",
            name,
        )


def _exit_if_abandoned(parent_pid: int, signal_number: int, seen_signals: set[int]) -> None:
    """Have this process end if its launcher or another of its ranks is gone.

    Ranks that work with the lost one then abort (`Preemption.has_lost_peer`), and save the steps they have
    completed. A main thread that has not recorded the signal by now waits for the lost rank: it gets a few
    seconds for that.
    """
    is_preemption = signal.SIGUSR1 in seen_signals
    has_lost_launcher = os.getppid() != parent_pid
    is_rank_missing = _count_living_ranks(parent_pid) < read_rank_layout().ranks_per_node
    preemption.has_lost_peer = has_lost_launcher or is_rank_missing
    is_abandoned = not is_preemption if has_lost_launcher else is_rank_missing
    if is_abandoned and preemption.requested_by is None:
        exit_code = EXIT_PREEMPTED if is_preemption else 128 + signal_number
        _schedule_call(_ABANDONED_SECONDS, os._exit, exit_code)


def _exit_at_once(exit_code: int, message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"wan_dist: {message}\n".encode())
    os._exit(exit_code)


def _count_living_ranks(launcher_pid: int) -> int:
    """Return the number of child processes of the launcher that are alive."""
    num_living = 0
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        try:
            process_state, parent_pid = stat_file.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # the process has ended meanwhile
            continue
        num_living += int(parent_pid) == launcher_pid and process_state not in "ZX"
    return num_living
