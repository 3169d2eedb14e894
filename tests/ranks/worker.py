"""One rank of a table of cases: runs each through the command and writes what came of it, so that
processes start once.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch


def main(table: Path, rank: int, num_ranks: int) -> None:
    from wan_dist.run import main as run

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    codes = []
    for port, arguments in json.loads(table.read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(port)
        try:
            codes.append(run(arguments))
        except BaseException:
            traceback.print_exc()
            codes.append(-1)
    table.with_name(f"codes-{rank}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:4]))
