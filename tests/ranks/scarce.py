"""The command, on ranks of which the last finds no room for the first few things that are tried."""

import os
import sys

import torch

from wan_dist.pipeline import out_of_memory as memory
from wan_dist.run import main

tries: list[int] = []


def allocate(num_bytes: int, device: torch.device) -> None:
    tries.append(num_bytes)
    if os.environ["RANK"] != "0" and len(tries) <= int(os.environ["FAILURES"]):
        raise torch.OutOfMemoryError("as on a GPU that is full")


if __name__ == "__main__":
    memory._allocate_bytes = allocate
    sys.exit(main(sys.argv[1:]))
