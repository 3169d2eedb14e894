"""What happens in a run with jobs, for people (a line each) and for machines (a line of JSON each)."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from wan_dist.durations import duration
from wan_dist.errors import InputError
from wan_dist.log import ANNOUNCEMENT, logger
from wan_dist.parallel.counts import Counts


class Events:
    """``target``: the file that lines of JSON are added to, - for standard output, None for none; ``total``: the jobs that are to be made.

    Counts are of all ranks: each tells of its own jobs. Raises InputError for a file that cannot be written.
    """

    def __init__(self, target: str | None, total: int, counts: Counts) -> None:
        self.target, self.total, self.counts = target, total, counts
        self._began = time.monotonic()
        if target not in (None, "-"):
            self._write("")

    def tell(self, event: str, **facts: Any) -> None:
        """Write a line of JSON: its time, the event, facts, and how many jobs are done, failed and left."""
        if self.target is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts, **self.standing()}, ensure_ascii=False) + "\n"
        if self.target == "-":
            sys.stdout.write(line)
            sys.stdout.flush()
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        assert self.target is not None
        try:
            with Path(self.target).expanduser().open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as fault:
            raise InputError(
                f"output.events={self.target} cannot be written: {fault.strerror}; name another file, or - for the output"
            ) from None

    def standing(self) -> dict[str, float | None]:
        """Return jobs done, failed and left, and the seconds that those are likely to take."""
        done, failed, elsewhere = (self.counts[name] for name in ("done", "failed", "elsewhere"))
        left = self.total - done - failed - elsewhere
        each = (time.monotonic() - self._began) / max(1, done + failed)
        return {"done": done, "failed": failed, "left": left, "seconds_left": round(each * left, 1) if done + failed else None}

    def announce(self, text: str) -> None:
        """Log a line about a job, with how many are left."""
        standing = self.standing()
        left = f"{standing['left']} left" + (f", about {duration(standing['seconds_left'] or 0)}" if standing["left"] else "")
        failed = f", {standing['failed']} failed" if standing["failed"] else ""
        logger.log(ANNOUNCEMENT, "job       %s; %d of %d done%s, %s", text, standing["done"], self.total, failed, left)
