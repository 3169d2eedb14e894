"""A table of runs, done one after the other by processes that are started once."""

import json
from pathlib import Path

from torch.distributed import TCPStore

from tests.forked import run_together


def run_workers(module: str, table: list[list[object]], num_ranks: int, folder: Path) -> str:
    """Run a module on this many ranks, which do the rows of a table one after the other; returns
    what they printed.

    Each row has a store of its own, held open here as torchrun's agent does, so that no row can
    find its port taken.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in table]
    file = folder / "table.json"
    file.write_text(
        json.dumps([[store.port, *row] for store, row in zip(stores, table, strict=True)]),
        encoding="utf-8",
    )
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = run_together(
        [[module, str(file), str(rank), str(num_ranks)] for rank in range(num_ranks)],
        [environment] * num_ranks,
    )
    told = "\n".join(one.stdout + one.stderr for one in done)
    assert [one.returncode for one in done] == [0] * num_ranks, told
    return told
