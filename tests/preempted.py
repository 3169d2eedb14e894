"""Runs the command and asks it to end: ``python -m tests.preempted MOMENT RANK key=value ...``;
MOMENT is a step, encode or decode.

The rank with this number sends itself SIGUSR1 there, as Slurm would before a job's time is up.
"""

import os
import signal
import sys
from typing import Any

from wan_dist.pipeline import decode as vae
from wan_dist.pipeline import denoise as denoising
from wan_dist.run import main
from wan_dist.sampling import solvers


def ask_at(moment: str) -> None:
    """Have this process asked at that moment."""
    if moment in ("encode", "decode"):
        place, name = (
            (denoising, "encode_conditioning") if moment == "encode" else (vae, "decode_latents")
        )
        work = getattr(place, name)

        def asked(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return work(*arguments)

        setattr(place, name, asked)
        return
    step = solvers.UniPC.step

    def asked_step(self: solvers.UniPC, index: int, *arguments: Any) -> Any:
        if index == int(moment):
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, index, *arguments)

    solvers.UniPC.step = asked_step  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == sys.argv[2]:
        ask_at(sys.argv[1])
    sys.exit(main(sys.argv[3:]))
