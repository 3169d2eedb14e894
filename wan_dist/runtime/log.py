"""One logger for the project, with the rank in each line when there is more than one."""

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from wan_dist.runtime.environment import read_rank_layout
from wan_dist.runtime.errors import escape_unprintable

logger = logging.getLogger("wan_dist")
ANNOUNCEMENT_LEVEL = logging.INFO + 5
"""The level of what every replica says, not only the first one."""


class _FailSafeFile(io.FileIO):
    """A file whose writing does not fail: where the disk is full or no reader is left, what is written is lost, not the run."""

    fault: OSError | None = None
    """Why something was lost, unless because its reader had enough."""

    def write(self, data: Any) -> int:
        """Write as much as can be, and return the size of all."""
        size = memoryview(data).nbytes
        try:
            return (
                super().write(data) or size
            )  # nothing is taken where it would have to wait for a reader
        except OSError as error:
            self.fault = None if isinstance(error, BrokenPipeError) else error
            return size


def _open_failsafe_stream(file: str | int, encoding: str | None = None) -> TextIO:
    raw_file = _FailSafeFile(
        file, "a" if isinstance(file, str) else "w", closefd=isinstance(file, str)
    )
    buffered_writer = io.BufferedWriter(raw_file)
    return io.TextIOWrapper(
        buffered_writer,
        encoding=encoding or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=True,
    )


def protect_streams() -> None:
    """Let a run go on when nobody reads what it prints any more: ``2>&1 | head``, a closed terminal, a full disk.

    Writing to standard output and error then does nothing, whoever writes: our log, progress bars, libraries. Streams that are closed
    from the start are opened, so that no file gets their numbers. Streams that were replaced, as tests do, stay.
    """
    while (null_descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null_descriptor, True)
    os.close(null_descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
            setattr(
                sys,
                name,
                _open_failsafe_stream(descriptor, None if stream is None else stream.encoding),
            )


def find_output_error() -> str | None:
    """Return why standard output is not whole, for commands whose output is their result; None where it is, or nobody reads it."""
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "fault", None)
    return None if error is None else error.strerror


def configure_logging(level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error, as ``[time rank] text``; of the other ranks only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_build_log_formatter())
    handler.setLevel(level if read_rank_layout().rank == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def show_announcements() -> None:
    """Let this rank's announcements, and what is worse, be seen as the first one's are."""
    for handler in logger.handlers:
        if handler.level > ANNOUNCEMENT_LEVEL:
            handler.setLevel(ANNOUNCEMENT_LEVEL)


def add_log_file(folder: Path) -> None:
    """Write all log lines of this rank to a file of its own in ``folder`` too, if that can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.StreamHandler(
            _open_failsafe_stream(str(folder / f"rank-{read_rank_layout().rank}.log"))
        )
    except OSError:  # of a folder that only the first rank's node has, for example
        return
    handler.setFormatter(_build_log_formatter())
    logger.addHandler(handler)


def _build_log_formatter() -> logging.Formatter:
    ranks = read_rank_layout()
    rank_label = f" rank {ranks.rank}" if ranks.num_ranks > 1 else ""
    return _EscapingFormatter(f"[%(asctime)s{rank_label}] %(message)s", datefmt="%H:%M:%S")


class _EscapingFormatter(logging.Formatter):
    """Names of files and prompts are others' text, which a terminal must not obey; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(escape_unprintable(line) for line in super().format(record).split("\n"))
