"""Runs the command and asks it to end: ``python -m tests.preempted MOMENT RANK key=value ...``;
MOMENT is a step, encode or decode; "1 3" is the third time that step 1 is made.

The rank with this number sends itself SIGUSR1 there, as Slurm would before a job's time is up, or another
signal: "1 3 SIGKILL".
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from wan_dist.pipeline import decode as vae
from wan_dist.pipeline import denoise as denoising
from wan_dist.run import main
from wan_dist.sampling import solvers


def ask_at(moment: str, num_times: str = "1", name: str = "SIGUSR1") -> None:
    """Have this process asked at that moment, the last of so many times."""
    times = iter(range(1, int(num_times) + 1))

    def ask() -> None:
        if next(times, None) == int(num_times):
            os.kill(os.getpid(), signal.Signals[name])

    if moment in ("encode", "decode"):
        place, function = (
            (denoising, "encode_conditioning") if moment == "encode" else (vae, "decode_latents")
        )
        work = getattr(place, function)

        def asked(*arguments: Any) -> Any:
            ask()
            return work(*arguments)

        setattr(place, function, asked)
        return
    for solver in (solvers.UniPC, solvers.DpmSolverPlusPlus, solvers.Renoising):
        ask_in_step(solver, int(moment), ask)


def ask_in_step(solver: type[solvers.Solver], asked_index: int, ask: Callable[[], None]) -> None:
    step = solver.step

    def asked_step(self: solvers.Solver, index: int, *arguments: Any) -> Any:
        if index == asked_index:
            ask()
        return step(self, index, *arguments)

    solver.step = asked_step  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == sys.argv[2]:
        ask_at(*sys.argv[1].split())
    sys.exit(main(sys.argv[3:]))
