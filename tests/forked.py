"""Commands in processes of their own that start no interpreter: forked from one that has imported what a
run imports, with their own arguments, environment, folder, output and exit code.

Tests of what signals do to an interpreter, of memory limits or of the order of imports start real ones.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore

from tests.composing import parse_once
from wan_dist.config.compose import compose_config

ROOT = Path(__file__).parents[1]
IMPORTED = (
    *("wan_dist.run", "wan_dist.pipeline.generate", "wan_dist.jobs.worker", "transformers"),
    "torch.distributed.run",
)
IMPORTED_FOR_FSDP = ("torch.distributed.fsdp", "torch._dynamo")
"""Takes as long again as the others."""
HANG_SECONDS = 900.0
"""Longer than any process of a test takes, on a machine with much else to do: it hangs."""
Done = subprocess.CompletedProcess[str]


@dataclass
class ForkedProcess:
    """A command that was forked, with that part of subprocess.Popen which the tests use."""

    server: "ForkServer"
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"the forked process {self.pid}", timeout or 0)
            time.sleep(0.02)
        return code


class ForkServer:
    """The process that commands are forked from, with these variables in its own environment too.

    The words ``place`` are those of a command that runs the one after them elsewhere, as the same process.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        place: Sequence[str] = (),
        modules: Sequence[str] = IMPORTED,
    ) -> None:
        self.process = subprocess.Popen(
            [*place, sys.executable, "-W", "ignore", "-m", "tests.forked", *modules],
            cwd=ROOT,
            # no threads, which a fork would lose
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Mapping[str, object]) -> int | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the server has ended with {self.process.wait()}"
        found = json.loads(answer)
        assert found is None or isinstance(found, int)
        return found

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: tuple[Path, Path],
        folder: Path = ROOT,
    ) -> ForkedProcess:
        """Start a module with its arguments; what it prints is appended to the files ``output``."""
        request = {
            "command": command,
            "environment": os.environ | environment,
            "output": [str(file) for file in output],
            "folder": str(folder),
        }
        pid = self.ask(request)
        assert pid is not None
        return ForkedProcess(self, pid)

    def close(self) -> None:
        self.process.communicate()


@functools.cache
def start_server() -> ForkServer:
    """Return the server of this process, which ends with it."""
    server = ForkServer({}, modules=(*IMPORTED, *IMPORTED_FOR_FSDP))
    atexit.register(server.close)
    return server


def run_forked(module: str, *arguments: str, **environment: str) -> Done:
    """Run ``python -m module`` in the checkout's folder."""
    (done,) = run_together([[module, *arguments]], [environment])
    return done


def run_ranks(num_ranks: int, module: str, *arguments: str) -> list[Done]:
    """Run a module on this many ranks of this machine; fails, with the end of what was said, if one fails."""
    done = start_ranks(num_ranks, module, *arguments)
    told = "\n".join(one.stderr[-3000:] for one in done)
    assert [one.returncode for one in done] == [0] * num_ranks, told
    return done


def start_ranks(num_ranks: int, module: str, *arguments: str, **environment: str) -> list[Done]:
    """Run a module on this many ranks of this machine, which may fail.

    Their store is held open here, as torchrun's agent does, so that its port cannot be taken.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [
        list_rank_variables(rank, num_ranks, store.port) | environment for rank in range(num_ranks)
    ]
    return run_together([[module, *arguments]] * num_ranks, environments)


def list_rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank of this machine, as torchrun sets them."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }


def run_torchrun(num_ranks: int, module: str, *arguments: str, **environment: str) -> Done:
    """Run a module on this many ranks by torchrun, whose own code is run; see tests/forked_torchrun.py."""
    return run_forked(
        "tests.forked_torchrun",
        *("--standalone", f"--nproc_per_node={num_ranks}", "-m", module, *arguments),
        **environment,
    )


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]
) -> list[Done]:
    """Run commands at the same time, each a module and its arguments, and wait for all of them.

    Their environment is this one's, as it is now, and what is given for each.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = [
            (Path(name, f"{number}.out"), Path(name, f"{number}.err"))
            for number in range(len(commands))
        ]
        server = start_server()
        running = [
            server.start(command, environment, output)
            for command, environment, output in zip(commands, environments, outputs, strict=True)
        ]
        codes = [process.wait(HANG_SECONDS) for process in running]
        told = [[file.read_text(encoding="utf-8") for file in output] for output in outputs]
    return [
        subprocess.CompletedProcess(list(command), code, out, err)
        for command, code, (out, err) in zip(commands, codes, told, strict=True)
    ]


def serve() -> None:
    """Fork for each command and answer with its process id; for a process id, with its exit code or null."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    parse_once()
    compose_config(["task=toy"])  # which finds Hydra's plugins
    gc.freeze()  # what is imported is not looked through by each command that collects garbage
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            ended, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            run_request(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    gc.unfreeze()  # else triton takes what is imported for leaks, and says so


def run_request(
    command: list[str], environment: dict[str, str], output: list[str], folder: str
) -> NoReturn:
    """Be the command: what is seen from here on is as in a process that was started with it."""
    for descriptor, file in enumerate([os.devnull, *output]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)  # without what was read ahead
    os.chdir(folder)
    become(command, environment)


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run a module with its arguments, in this environment, as the program of this process, and end as
    an interpreter does, but without the frames above and without freeing each object.
    """
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    module, *sys.argv[1:] = command
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(code, str):
        sys.stderr.write(code + "\n")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
