"""Runs ``launch doctor`` where what the second rank receives is wrong in one bit:
``torchrun -m tests.corrupted``.
"""

import sys
from collections.abc import Callable

from torch import Tensor

from launch.__main__ import main
from launch.doctor import exchange
from wan_dist.parallel.mesh import Axis

right = exchange.all_to_all


def wrong(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Exchange as it should be, but for one number."""
    received = right(x, axis)()
    if axis.rank == 1 and not x.is_floating_point():
        received.view(-1)[5] ^= 1
    return lambda: received


if __name__ == "__main__":
    exchange.all_to_all = wrong
    sys.exit(main(["doctor"]))
