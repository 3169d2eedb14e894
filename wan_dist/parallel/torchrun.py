"""torchrun without its log and tracebacks: ``python -m wan_dist.parallel.torchrun ARGUMENTS``.

The ranks print what ended the run. The exit code is that of the rank that failed first, and
`EXIT_PREEMPTED` after a signal; torchrun itself ends with 1 in all these cases. LOGLEVEL in the environment
shows torchrun's log, as it does with torchrun.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from wan_dist.runtime.signals import EXIT_PREEMPTED


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code."""
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        run.main(list(arguments))
    except SignalException:
        return EXIT_PREEMPTED
    except ChildFailedError as error:
        return _report_failure(*error.get_first_failure())
    return 0


def _report_failure(rank: int, failure: ProcessFailure) -> int:
    """Return the exit code of a rank; print how it ended unless it could do so itself."""
    message = failure.error_file_data.get("message")
    if isinstance(message, dict) and isinstance(exit_code := message.get("errorCode"), int):
        return exit_code
    how = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    sys.stderr.write(f"wan_dist: error: rank {rank} (process {failure.pid}) {how}\n")
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
