"""Serve a video API on all GPUs of this machine, from a queue on disk that survives restarts.

    python -m launch serve task=t2v-14B output.dir=videos
    python -m launch serve ranks=2 task=toy serve.port=8080
    curl localhost:8000/v1/videos -F prompt="Two cats, boxing on a stage"

Keys are those of a run, and: ranks=COUNT, by default one for each GPU. The port is serve.port=8000. Ranks
that die are started again, and the queue goes on; Ctrl-C or SIGTERM ends the service after the current step.
"""

import signal
import subprocess
import sys
import time
from types import FrameType

from launch.local import RunStart, prepare_start
from wan_dist.runtime.launcher import set_parent_death_signal
from wan_dist.runtime.signals import EXIT_PREEMPTED

DEFAULT_PORT = 8000
_FINAL_EXIT_CODES = (0, 2)
"""Exit codes after which the ranks are not started again: bad input stays bad.

`EXIT_PREEMPTED` is not among them: when one rank dies, torchrun sends the others SIGTERM.
"""
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_MAX_PAUSE_SECONDS = 60.0
_STABLE_SECONDS = 600.0
"""Seconds of work after which a death counts as the first one."""


def main(arguments: list[str]) -> int | None:
    """Run the service until it is requested to end, and return the exit code.

    Raises InputError for invalid settings, before anything heavy starts.
    """
    if not any(argument.startswith("serve.port=") for argument in arguments):
        arguments = [*arguments, f"serve.port={DEFAULT_PORT}"]
    start = prepare_start(arguments)
    if start is None:
        return None
    sys.stderr.write(f"$ {start.command_line}\n")
    return Supervisor(start).run()


class Supervisor:
    """Starts the ranks, and starts them again when they die."""

    def __init__(self, start: RunStart) -> None:
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = False

    def run(self) -> int:
        """Run until a signal comes or the settings are refused, and return the exit code."""
        previous_handlers = {
            number: signal.signal(number, self._forward_signal)
            for number in _FORWARDED_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            return self._keep_running()
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def _keep_running(self) -> int:
        num_deaths = 0
        while True:
            started_at = time.monotonic()
            # the ranks end with this process, however it ends
            self._process = subprocess.Popen(
                self._start.command,
                env=self._start.environment,
                preexec_fn=set_parent_death_signal,
            )
            if self._is_ending:  # the signal came before there was a process to send it to
                self._process.terminate()
            exit_code = self._process.wait()
            if self._is_ending or exit_code in _FINAL_EXIT_CODES:
                return exit_code if exit_code >= 0 else 128 - exit_code
            if time.monotonic() - started_at > _STABLE_SECONDS:
                num_deaths = 0
            pause_seconds = min(2.0**num_deaths, _MAX_PAUSE_SECONDS)
            num_deaths += 1
            sys.stderr.write(
                f"launch: the ranks ended with exit code {exit_code}; "
                f"started again in {pause_seconds:.0f} s\n"
            )
            if self._wait_before_restart(pause_seconds):
                return EXIT_PREEMPTED

    def _wait_before_restart(self, seconds: float) -> bool:
        """Wait, and return whether the service was requested to end meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._is_ending:
            time.sleep(0.1)
        return self._is_ending

    def _forward_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self._is_ending = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal_number)
