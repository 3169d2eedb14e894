"""A pipeline on several GPUs of this machine, with a process for each, started from one Python program.

``python -m wan_dist.pipeline.rank_processes DESCRIPTOR`` is one of these processes. It has a connection to
the program, from which it gets calls and to which it answers.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, cast

from wan_dist.runtime.environment import silence_library_warnings
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.launcher import set_parent_death_signal

_CLOSE_SECONDS = 60.0
"""Seconds that the processes have to exit by themselves."""


class PipelineError(RuntimeError):
    """A call failed in the processes of a pipeline; their own output says more."""


class PipelineProcesses:
    """`VideoPipeline` on ``num_gpus`` GPUs of this machine; calls and results are the same.

    After a call that failed the pipeline can be called again, unless a process has ended.
    """

    def __init__(self, task: str, num_gpus: int, settings: dict[str, Any]) -> None:
        from torch._C._distributed_c10d import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_gpus):
                self._start_process(rank, num_gpus)
            self._request("open", task, settings)
        except BaseException:
            self.close()
            raise

    def __call__(self, prompt: str, **settings: Any) -> Any:
        """Generate one video; see `VideoPipeline.__call__`. Raises PipelineError where it failed."""
        return self._request("generate", prompt, settings)

    def plan(self, prompt: str = "", **settings: Any) -> Any:
        """Return what `__call__` would do; see `VideoPipeline.plan`."""
        return self._request("plan", prompt, settings)

    def close(self) -> None:
        """End the processes; those that do not exit by themselves are killed."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.close()
        for process in self._processes:
            try:
                process.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connections, self._processes = [], []

    def __enter__(self) -> "PipelineProcesses":
        """Return the pipeline itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the pipeline."""
        self.close()

    def _start_process(self, rank: int, num_ranks: int) -> None:
        connection, other_end = Pipe()
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        silence_library_warnings(environment)
        descriptor = other_end.fileno()
        command = [sys.executable, "-m", "wan_dist.pipeline.rank_processes", str(descriptor)]
        # Ctrl-C ends the call in this program, which then ends the processes.
        self._processes.append(
            subprocess.Popen(
                command, env=environment, pass_fds=[descriptor], start_new_session=True
            )
        )
        self._connections.append(connection)
        other_end.close()

    def _request(self, *request: object) -> Any:
        """Send a request to all processes and return the first one's answer."""
        if not self._connections:
            raise PipelineError("the pipeline is closed; open another one")
        message = pickle.dumps(request)
        try:
            for connection in self._connections:
                with contextlib.suppress(BrokenPipeError):  # the answer says that it has ended
                    connection.send_bytes(message)
            answers = self._receive_answers()
        except BaseException:
            for process in self._processes:
                process.terminate()
            self.close()
            raise
        errors = [error for error, _ in answers if error is not None]
        if errors:
            raise next((error for error in errors if isinstance(error, InputError)), errors[0])
        return answers[0][1]

    def _receive_answers(self) -> list[tuple[Exception | None, Any]]:
        """Return the answers in the order of ranks; raises PipelineError if a process has ended."""
        answer_by_rank: dict[int, tuple[Exception | None, Any]] = {}
        while pending := [
            connection
            for rank, connection in enumerate(self._connections)
            if rank not in answer_by_rank
        ]:
            for ready in wait(pending):
                rank = self._connections.index(cast(Connection, ready))
                try:
                    answer_by_rank[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, OSError):
                    exit_code = self._processes[rank].wait()
                    raise PipelineError(
                        f"the process of rank {rank} ended with exit code {exit_code}; "
                        "its output says why"
                    ) from None
        return [answer_by_rank[rank] for rank in sorted(answer_by_rank)]


def serve_requests(connection: Connection) -> None:
    """Answer a program's requests until it closes the connection or the pipeline cannot be opened."""
    from wan_dist.pipeline.video_pipeline import open_pipeline

    def answer(work: Callable[[], Any]) -> Any:
        """Send the first rank's result of the work, or its error; returns the result."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except InputError as input_error:
            error = InputError(str(input_error))
        except Exception as other_error:
            error = PipelineError(f"{type(other_error).__name__}: {other_error}")
        connection.send_bytes(pickle.dumps((error, result if os.environ["RANK"] == "0" else None)))
        return result

    with contextlib.suppress(EOFError), ExitStack() as exit_stack:
        _, task, settings = pickle.loads(connection.recv_bytes())

        def open_and_keep() -> None:
            exit_stack.enter_context(pipeline := open_pipeline(task, **settings))
            methods.update(generate=pipeline.__call__, plan=pipeline.plan)

        methods: dict[str, Callable[..., Any]] = {}
        answer(open_and_keep)
        while methods:
            name, prompt, settings = pickle.loads(connection.recv_bytes())
            answer(partial(methods[name], prompt, **settings))


if __name__ == "__main__":
    # Not this module's own copy, whose errors the program could not unpickle.
    from wan_dist.pipeline import rank_processes

    set_parent_death_signal()
    rank_processes.serve_requests(Connection(int(sys.argv[1])))
