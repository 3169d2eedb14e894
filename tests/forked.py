"""Commands in processes of their own that start no interpreter: forked from one that has imported what a
run imports, with their own arguments, environment, output and exit code.

Tests of signals, memory limits or the order of imports start real ones.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
IMPORTED = ("wan_dist.run", "wan_dist.pipeline.generate", "wan_dist.jobs.worker", "transformers")
Done = subprocess.CompletedProcess[str]


def run_forked(module: str, *arguments: str) -> Done:
    """Run ``python -m module`` in the checkout's folder."""
    (done,) = run_together([[module, *arguments]], [{}])
    return done


def run_ranks(num_ranks: int, module: str, *arguments: str) -> list[Done]:
    """Run a module on this many ranks of this machine; fails, with the end of what they said, if one fails.

    Their store is held open here, as torchrun's agent does, so that its port cannot be taken.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        }
        for rank in range(num_ranks)
    ]
    done = run_together([[module, *arguments]] * num_ranks, environments)
    told = "\n".join(one.stderr[-3000:] for one in done)
    assert [one.returncode for one in done] == [0] * num_ranks, told
    return done


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]
) -> list[Done]:
    """Run commands at the same time, each a module and its arguments, and wait for all of them.

    Their environment is this one's, as it is now, and what is given for each.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            [f"{folder}/{number}.{name}" for name in ("out", "err")]
            for number in range(len(commands))
        ]
        request = [
            {"command": command, "environment": os.environ | environment, "output": output}
            for command, environment, output in zip(commands, environments, outputs, strict=True)
        ]
        server = start_server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server has ended with {server.wait()}"
        told = [[Path(file).read_text(encoding="utf-8") for file in output] for output in outputs]
    return [
        subprocess.CompletedProcess(list(command), code, out, err)
        for command, code, (out, err) in zip(commands, json.loads(answer), told, strict=True)
    ]


@functools.cache
def start_server() -> subprocess.Popen[str]:
    """Start the process that the commands are forked from; it ends with this one."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.forked"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # no threads, which a fork would lose
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Fork for each command of each request, and answer with their exit codes."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            if (child := os.fork()) == 0:
                run_request(**request)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


def run_request(command: list[str], environment: dict[str, str], output: list[str]) -> NoReturn:
    """Be the command: what is seen from here on is as in a process that was started with it."""
    for descriptor, file in enumerate([os.devnull, *output]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)  # without what was read ahead
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve()
