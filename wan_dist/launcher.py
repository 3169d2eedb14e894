"""What a rank does about the torchrun that started it: neither outlives the other."""

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 20.0

_UNDERTAKER = """
import os, signal, sys, time
launcher, patience = int(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + patience
while time.monotonic() < end:
    time.sleep(0.5)
    try:
        os.kill(launcher, 0)
    except OSError:
        sys.exit()
os.kill(launcher, signal.SIGKILL)
"""


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Have the kernel end this rank when torchrun dies; a torchrun that is killed does not end its ranks itself."""
    if _launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def bury_launcher() -> None:
    """After this rank has failed: see that its torchrun ends too, unless it may start the ranks again.

    A torchrun that has lost the rendezvous host waits for it for 15 minutes, deaf to SIGTERM.
    """
    may_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if _launched() and not may_restart:
        command = [sys.executable, "-c", _UNDERTAKER, str(os.getppid()), str(_PATIENCE)]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
