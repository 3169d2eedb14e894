"""One logger for the project, with the rank in each line when there is more than one."""

import logging
import sys
from pathlib import Path

from wan_dist.environment import read_ranks
from wan_dist.errors import printable

logger = logging.getLogger("wan_dist")
ANNOUNCEMENT = logging.INFO + 5
"""The level of what every replica says, not only the first one."""


def open_log(level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error, as ``[time rank] text``; of the other ranks only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_form())
    handler.setLevel(level if read_ranks().rank == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def announce_here() -> None:
    """Let this rank's announcements, and what is worse, be seen as the first one's are."""
    for handler in logger.handlers:
        if handler.level > ANNOUNCEMENT:
            handler.setLevel(ANNOUNCEMENT)


def keep_log(folder: Path) -> None:
    """Write all log lines of this rank to a file of its own in ``folder`` too, if that can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank-{read_ranks().rank}.log", mode="a", encoding="utf-8")
    except OSError:  # of a folder that only the first rank's node has, for example
        return
    handler.setFormatter(_form())
    logger.addHandler(handler)


def _form() -> logging.Formatter:
    ranks = read_ranks()
    rank = f" rank {ranks.rank}" if ranks.num_ranks > 1 else ""
    return _Printable(f"[%(asctime)s{rank}] %(message)s", datefmt="%H:%M:%S")


class _Printable(logging.Formatter):
    """Names of files and prompts are others' text, which a terminal must not obey; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))
