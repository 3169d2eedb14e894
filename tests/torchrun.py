"""Modules started on several ranks by torchrun, as users start them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.forked import HANG_SECONDS


def torchrun(
    num_ranks: int, module: str, *arguments: str, timeout: float = HANG_SECONDS, code: int = 0
) -> str:
    """Run a module on this many ranks of this machine and return what it printed; fails, with the
    end of what it said, at another code.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
    ]
    done = subprocess.run(
        [*command, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout
