"""One logger for the project, with the rank in each line when there is more than one."""

import logging
import os
import sys

logger = logging.getLogger("wan_dist")


def open_log(level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error, as ``[time rank] text``; of the other ranks only errors."""
    several_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = f" rank {os.environ.get('RANK', '0')}" if several_ranks else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s{rank}] %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False
