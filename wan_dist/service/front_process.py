"""The front as a process of the first rank, which starts it again where it dies."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.service.request_planner import RequestPlanner

_RESTART_SECONDS = 1.0
"""Seconds before a front that has died is started again."""
_CLOSE_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class FrontStart:
    """What a front is started with."""

    planner: RequestPlanner
    run: str
    """Of the ranks that work on the requests."""
    port: int
    """0: a free one."""


class FrontProcess:
    """Starts the front, and keeps it running until `close`."""

    def __init__(self, planner: RequestPlanner, run: str) -> None:
        self._planner, self._run = planner, run
        self._port = planner.config.serve.port or 0
        self._process: subprocess.Popen[bytes] | None = None
        self._close_event = threading.Event()

    def start(self) -> str:
        """Start the front, and return its URL once it listens; raises InputError where it cannot.

        The URL is also in ``service/front.json`` in the output folder, for clients of other hosts.
        """
        url = self._start_process()
        self._port = urlsplit(url).port or self._port
        address = {"url": url, "host": socket.gethostname()}
        with atomic_write(self._planner.output_folder / "service" / "front.json") as path:
            path.write_text(json.dumps(address) + "\n")
        threading.Thread(target=self._watch, daemon=True).start()
        return url

    def close(self) -> None:
        """End the front."""
        self._close_event.set()
        if self._process is not None:
            _end_process(self._process)

    def _start_process(self) -> str:
        python_path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, python_path))}
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "wan_dist.service.front"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # not reached by signals that a terminal sends to the run
        )
        assert process.stdin is not None
        assert process.stdout is not None
        start = FrontStart(self._planner, self._run, self._port)
        with suppress(OSError):  # it has ended; what it printed says why
            pickle.dump(start, process.stdin)
            process.stdin.flush()
        answer = json.loads(
            process.stdout.readline() or b'{"error": "the front has ended at once"}'
        )
        if "error" in answer:
            _end_process(process)
            raise InputError(answer["error"])
        return str(answer["url"])

    def _watch(self) -> None:
        """Start the front again whenever it ends before `close`."""
        while True:
            assert self._process is not None
            exit_code = self._process.wait()
            _end_process(self._process)
            if self._close_event.wait(_RESTART_SECONDS):
                return
            logger.warning("the front has ended with %d and is started again", exit_code)
            try:
                self._start_process()
            except (InputError, OSError) as error:
                logger.warning("the front cannot be started: %s", error)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """End a front, by the end of its standard input, and close its pipes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(_CLOSE_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
