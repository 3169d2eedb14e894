"""One rank of a table of runs in which something goes wrong on one rank:
``python -m tests.ranks.faulty_worker TABLE RANK RANKS``.

A row: a port, arguments, and what fails: on which rank, in which method, at which of its calls,
with what error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.ranks.worker import limit_row_time
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.vae.model import Decoder, Encoder
from wan_dist.run import main as run

METHODS = {
    "decode": (Decoder, "forward"),
    "encode": (Encoder, "compute_features"),
    "denoise": (FusedTransformer, "forward"),
}
ERRORS = {
    "memory": torch.OutOfMemoryError("as on a full GPU"),
    "error": RuntimeError("as of cuDNN, on this rank alone"),
}


def failing(
    method: Callable[..., Any], at_call: int, error: Exception, when: Path
) -> Callable[..., Any]:
    """Return the method, whose call of this number fails."""
    num_calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            when.write_text(str(time.monotonic()))
            raise error
        return method(*arguments, **options)

    return call


def main(table: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    outcomes = []
    for number, (port, arguments, fault) in enumerate(
        json.loads(table.read_text(encoding="utf-8"))
    ):
        os.environ["MASTER_PORT"] = str(port)
        when = table.with_name(f"when-{number}")
        with ExitStack() as patches:
            if fault is not None and fault["rank"] == rank:
                owner, name = METHODS[fault["place"]]
                method = failing(getattr(owner, name), fault["call"], ERRORS[fault["kind"]], when)
                patches.enter_context(patch.object(owner, name, method))
            began = time.monotonic()
            try:
                with limit_row_time():
                    code = run(arguments)
            except BaseException:
                traceback.print_exc()
                code = -1
        end = time.monotonic()
        fault_time = float(when.read_text()) if when.exists() else end
        outcomes.append((code, end - fault_time, end - began))
    table.with_name(f"outcomes-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:4]))
