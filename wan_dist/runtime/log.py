"""Logging of all ranks: one logger for the project, and output streams that cannot fail a run.

Each line has the rank if there is more than one.
"""

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
"""Level of the messages that every replica logs, not only the first one."""


class _FailSafeFile(io.FileIO):
    """File whose writes never raise: with a full disk or no reader, the output is lost, not the run."""

    fault: OSError | None = None
    """The error by which output was lost; None if the reader has closed its end."""

    def write(self, data: Any) -> int:
        """Write as much as possible, and return the size of all the data in bytes."""
        size = memoryview(data).nbytes
        try:
            # None where it would block: a reader that does not read must not stop the run
            return super().write(data) or size
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
    """Keep a run alive when its output cannot be written: ``2>&1 | head``, a closed terminal, a full disk.

    Writes to standard output and error then do nothing, whoever writes: our log, progress bars, libraries.
    Streams that are closed from the start are opened, so that no file gets their descriptors. Streams that
    were replaced, as tests do, stay.
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
    """Return why standard output is incomplete, None if it is complete or its reader has closed it.

    For commands whose output is their result.
    """
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "fault", None)
    return None if error is None else error.strerror


def configure_logging(level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error, as ``[time rank] text``.

    Ranks other than the first log errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_build_log_formatter())
    handler.setLevel(level if read_rank_layout().rank == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def show_announcements() -> None:
    """Log this rank's messages of `ANNOUNCEMENT_LEVEL` and above, as the first rank's are."""
    for handler in logger.handlers:
        if handler.level > ANNOUNCEMENT_LEVEL:
            handler.setLevel(ANNOUNCEMENT_LEVEL)


def add_log_file(folder: Path) -> None:
    """Also write all log lines of this rank to a file of its own in ``folder``, if that can be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.StreamHandler(
            _open_failsafe_stream(str(folder / f"rank-{read_rank_layout().rank}.log"))
        )
    except OSError:  # a folder that only the first rank's node has, for example
        return
    handler.setFormatter(_build_log_formatter())
    logger.addHandler(handler)


def _build_log_formatter() -> logging.Formatter:
    ranks = read_rank_layout()
    num_digits = len(
        str(ranks.num_ranks - 1)
    )  # the same for all, so that lines of all ranks line up
    rank_label = f" rank {ranks.rank:{num_digits}}" if ranks.num_ranks > 1 else ""
    return _EscapingFormatter(f"[%(asctime)s{rank_label}] %(message)s", datefmt="%H:%M:%S")


_LEVEL_LABELS = {logging.WARNING: "warning   ", logging.ERROR: "error     "}


class _EscapingFormatter(logging.Formatter):
    """Log formatter that escapes unprintable characters; tracebacks keep their lines.

    File names and prompts come from others, and a terminal must not interpret them. A warning or an error
    has its level in the column where other lines name the stage.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = _LEVEL_LABELS.get(record.levelno, "") + record.message
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(escape_unprintable(line) for line in super().format(record).split("\n"))
