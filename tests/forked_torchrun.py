"""torchrun whose ranks are forked from it, ``python -m tests.forked_torchrun`` with torchrun's arguments.

All of its code is run but the call that starts a rank's interpreter. The environment's LAUNCHER may name a
module whose ``main`` calls it.
"""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)

from tests.forked import become


class ForkedRank:
    """A rank, with that part of subprocess.Popen which torchrun uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
            time.sleep(0.02)
        return code


def fork_rank(
    _: SubprocessHandler, words: Sequence[str], environment: Mapping[str, str]
) -> ForkedRank:
    """Fork a rank for the words of its command, which are python -u -m MODULE [argument ...]."""
    _, *options, module_option, module = words[:4]
    assert [*options, module_option] == ["-u", "-m"], words
    if (pid := os.fork()) == 0:
        run_rank([module, *words[4:]], environment)
    return ForkedRank(pid)


def run_rank(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the rank: what an exec would have reset is as after one."""
    os.setsid()
    logging.disable(logging.NOTSET)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    become(command, environment)


if __name__ == "__main__":
    SubprocessHandler._popen = fork_rank  # type: ignore[assignment,method-assign]
    launcher = importlib.import_module(os.environ.get("LAUNCHER", "torch.distributed.run"))
    sys.exit(launcher.main(sys.argv[1:]))
