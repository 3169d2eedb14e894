"""List the videos that runs have left in a folder: settings, time, speed, memory, and what failed.

    python -m launch runs outputs

A line for each video, by run and name, under one that failed why, and at the end each run and all in all. Seconds are a video's own, s/it
and TFLOP/s those of its steps and of one rank.
"""

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.arguments import path_of
from wan_dist.output.gallery.records import Record, read_records
from wan_dist.output.gallery.runs import Run, read_runs
from wan_dist.runtime.durations import duration
from wan_dist.runtime.errors import InputError, printable

_HEADS = ("name", "task", "size x frames", "steps", "seed", "seconds", "s/it", "TFLOP/s", "peak GiB", "status")
_LEFT = (0, 1, 9)
"""Columns of text."""
_WIDE = 140
"""Columns of what is no terminal."""


def main(arguments: list[str]) -> None:
    """Print the table; raises InputError for a folder that is none or has no records."""
    _, records, runs = folder_of(arguments, "runs")
    sys.stdout.write("\n".join(lines_of(records, runs, shutil.get_terminal_size((_WIDE, 24)).columns)) + "\n")


def folder_of(arguments: Sequence[str], command: str) -> tuple[Path, list[Record], list[Run]]:
    """Return the folder that a command was given and what is in it; raises InputError."""
    if len(arguments) != 1:
        raise InputError(f"{command} takes the folder that the videos are in, e.g. python -m launch {command} outputs")
    folder = path_of("folder", arguments[0])
    if not folder.is_dir():
        raise InputError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}; give the folder that the videos are in")
    records = read_records(folder)
    if not records:
        raise InputError(f"{folder} has no records of videos; they lie beside them as NAME.json, in a run's output.dir")
    return folder, records, read_runs(folder)


def lines_of(records: Sequence[Record], runs: Sequence[Run], columns: int) -> list[str]:
    """Return the table as lines of at most so many columns."""
    rows = [_HEADS, *(_row(record) for record in records)]
    widths = [max(_width(row[place]) for row in rows) for place in range(len(_HEADS))]
    spare = columns - sum(widths) - 2 * (len(widths) - 1)
    least = max(8, widths[0] + spare)
    widths[0] = min(widths[0], least)
    lines = [_line(_HEADS, widths, columns)]
    for record, row in zip(records, rows[1:], strict=True):
        lines.append(_line(row, widths, columns))
        if record.error:
            wrapped = textwrap.wrap(printable(record.error), max(20, columns - 2))
            lines += [_cut(f"  {line}", columns) for line in wrapped]
    return [*lines, "", *(_cut(line, columns) for line in _totals(records, runs))]


def _row(record: Record) -> tuple[str, ...]:
    size = f"{record.width}x{record.height}x{record.num_frames}" if record.width and record.num_frames else "-"
    peak = "-" if record.peak is None else f"{record.peak[0]:.1f} {record.peak[1]}"
    numbers = (_shown(record.seconds, ".1f"), _shown(record.step_seconds, ".3f"), _shown(record.tflops, ".3g"))
    words = (record.name, record.task or "-", size, _shown(record.steps), _shown(record.seed), *numbers, peak, record.status)
    return tuple(printable(word) for word in words)


def _totals(records: Sequence[Record], runs: Sequence[Run]) -> Iterator[str]:
    told = {run.name: run for run in runs}
    names = list(dict.fromkeys(record.run for record in records if record.run))
    for name in names:
        own = [record for record in records if record.run == name]
        run = told.get(name)
        took = "" if run is None or run.seconds is None else f" in {duration(run.seconds)}"
        ranks = f" on {run.ranks} rank{'' if run.ranks == 1 else 's'}" if run is not None and run.ranks else ""
        yield f"run {printable(name)}: {_counted(own)}{took}{ranks}"
    seconds = sum(record.seconds or 0.0 for record in records)
    peaks = [f"{max(found):.1f} GiB of the {of} at most" for of in ("GPU", "host") if (found := _peaks(records, of))]
    yield ", ".join([_counted(records), f"{duration(seconds)} of work", *peaks])


def _peaks(records: Sequence[Record], of: str) -> list[float]:
    return [record.peak[0] for record in records if record.peak is not None and record.peak[1] == of]


def _counted(records: Sequence[Record]) -> str:
    failed = sum(record.status == "failed" for record in records)
    done = len(records) - failed
    return f"{done} video{'' if done == 1 else 's'}" + (f", {failed} failed" if failed else "")


def _shown(value: float | None, style: str = "") -> str:
    return "-" if value is None else format(value, style)


def _line(row: Sequence[str], widths: Sequence[int], columns: int) -> str:
    cells = []
    for place, (word, width) in enumerate(zip(row, widths, strict=True)):
        word = _cut(word, width)
        gap = " " * (width - _width(word))
        cells.append(word + gap if place in _LEFT else gap + word)
    return _cut("  ".join(cells).rstrip(), columns)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else not unicodedata.combining(character) for character in text)


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 1:
        text = text[:-1]
    return f"{text}…"
