"""One rank of a table of runs: ``python -m tests.ranks.worker TABLE RANK RANKS``. It does each through the
command and writes what came of it, so that processes start once.

A row: a port, a number of ranks, arguments. Ranks from that number on sit the row out.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.forked import HANG_SECONDS
from wan_dist.run import main as run


@contextmanager
def limit_row_time() -> Iterator[None]:
    """End this process, with the stacks of its threads, if what it does takes too long."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_row(rank: int, num_ranks: int, port: int, arguments: list[str]) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_PORT": str(port),
    }
    try:
        with limit_row_time():
            return run(arguments)
    except BaseException:
        traceback.print_exc()
        return -1


def main(table: Path, rank: int, _: int) -> None:
    torch.set_num_threads(1)
    codes = [
        run_row(rank, num_ranks, port, arguments) if rank < num_ranks else None
        for port, num_ranks, arguments in json.loads(table.read_text(encoding="utf-8"))
    ]
    table.with_name(f"codes-{rank}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:4]))
