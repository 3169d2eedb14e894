"""The command, with one rank that breaks in the middle of denoising: what torchrun is given to see
what becomes of the others.
"""

import os
import sys

from wan_dist.pipeline import denoise as denoising
from wan_dist.run import main
from wan_dist.sampling.solvers import Euler


class Breaking(Euler):
    def step(self, index: int, *rest: object) -> object:
        if os.environ["RANK"] == os.environ["BREAK_RANK"] and index == 1:
            raise RuntimeError("this rank broke")
        return super().step(index, *rest)


if __name__ == "__main__":
    denoising.make_solver = lambda _, schedule, noise: Breaking(schedule, noise)
    sys.exit(main(sys.argv[1:]))
