"""List the videos of a results folder: settings, time, speed, memory and errors.

    python -m launch runs outputs

A line for each video, by run and name, with the error under one that failed; at the end the totals of each
run and of all. Seconds are a video's own, s/it and TFLOP/s those of its steps and of one rank.
"""

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.arguments import expand_user_path
from wan_dist.output.gallery.records import GalleryVideo, read_records
from wan_dist.output.gallery.runs import RunRecord, read_runs
from wan_dist.runtime.durations import format_duration
from wan_dist.runtime.errors import InputError, escape_unprintable

_COLUMN_TITLES = (
    "name",
    "task",
    "size x frames",
    "steps",
    "seed",
    "seconds",
    "s/it",
    "TFLOP/s",
    "peak GiB",
    "status",
)
_LEFT_ALIGNED_COLUMNS = (0, 1, 9)
"""Columns of text; numbers are right-aligned."""
_DEFAULT_WIDTH = 140
"""Characters in a line where standard output is no terminal."""


def main(arguments: list[str]) -> None:
    """Print the table; raises InputError for a missing folder, or one without records."""
    _, records, runs = read_results_folder(arguments, "runs")
    sys.stdout.write(
        "\n".join(
            format_table(records, runs, shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns)
        )
        + "\n"
    )


def read_results_folder(
    arguments: Sequence[str], command: str
) -> tuple[Path, list[GalleryVideo], list[RunRecord]]:
    """Return the folder given to ``command``, its video records and its runs; raises InputError."""
    if len(arguments) != 1:
        raise InputError(
            f"{command} needs the folder of the videos, e.g. python -m launch {command} outputs"
        )
    folder = expand_user_path("folder", arguments[0])
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "missing"
        raise InputError(f"{folder} is {problem}; give the folder of the videos")
    records = read_records(folder)
    if not records:
        raise InputError(
            f"{folder} has no records of videos (NAME.json); give the output.dir of a run"
        )
    return folder, records, read_runs(folder)


def format_table(
    records: Sequence[GalleryVideo], runs: Sequence[RunRecord], max_width: int
) -> list[str]:
    """Return the table as lines of at most ``max_width`` characters."""
    rows = [_COLUMN_TITLES, *(_format_row(record) for record in records)]
    widths = [
        max(_measure_width(row[column]) for row in rows) for column in range(len(_COLUMN_TITLES))
    ]
    spare_width = max_width - sum(widths) - 2 * (len(widths) - 1)
    name_width = max(8, widths[0] + spare_width)
    widths[0] = min(widths[0], name_width)
    lines = [_format_line(_COLUMN_TITLES, widths, max_width)]
    for record, row in zip(records, rows[1:], strict=True):
        lines.append(_format_line(row, widths, max_width))
        if record.error:
            error_lines = textwrap.wrap(escape_unprintable(record.error), max(20, max_width - 2))
            lines += [_truncate_text(f"  {line}", max_width) for line in error_lines]
    return [
        *lines,
        "",
        *(_truncate_text(line, max_width) for line in _format_totals(records, runs)),
    ]


def _format_row(record: GalleryVideo) -> tuple[str, ...]:
    size_text = (
        f"{record.width}x{record.height}x{record.num_frames}"
        if record.width and record.num_frames
        else "-"
    )
    peak_text = (
        "-"
        if record.peak_memory is None
        else f"{record.peak_memory[0]:.1f} {record.peak_memory[1]}"
    )
    number_texts = (
        _format_number(record.seconds, ".1f"),
        _format_number(record.step_seconds, ".3f"),
        _format_number(record.tflops, ".3g"),
    )
    cells = (
        record.name,
        record.task or "-",
        size_text,
        _format_number(record.steps),
        _format_number(record.seed),
        *number_texts,
        peak_text,
        record.status,
    )
    return tuple(escape_unprintable(cell) for cell in cells)


def _format_totals(records: Sequence[GalleryVideo], runs: Sequence[RunRecord]) -> Iterator[str]:
    run_by_name = {run.name: run for run in runs}
    run_names = list(dict.fromkeys(record.run for record in records if record.run))
    for run_name in run_names:
        run_records = [record for record in records if record.run == run_name]
        run = run_by_name.get(run_name)
        time_text, ranks_text = "", ""
        if run is not None and run.seconds is not None:
            time_text = f" in {format_duration(run.seconds)}"
        if run is not None and run.ranks:
            ranks_text = f" on {run.ranks} rank{'' if run.ranks == 1 else 's'}"
        yield f"run {escape_unprintable(run_name)}: {_format_counts(run_records)}{time_text}{ranks_text}"
    seconds = sum(record.seconds or 0.0 for record in records)
    peak_texts = [
        f"{max(peaks_of_kind):.1f} GiB peak of the {memory_kind}"
        for memory_kind in ("GPU", "host")
        if (peaks_of_kind := _list_peaks(records, memory_kind))
    ]
    yield ", ".join([_format_counts(records), f"{format_duration(seconds)} of work", *peak_texts])


def _list_peaks(records: Sequence[GalleryVideo], memory_kind: str) -> list[float]:
    return [
        record.peak_memory[0]
        for record in records
        if record.peak_memory is not None and record.peak_memory[1] == memory_kind
    ]


def _format_counts(records: Sequence[GalleryVideo]) -> str:
    num_failed = sum(record.status == "failed" for record in records)
    num_done = len(records) - num_failed
    failed_text = f", {num_failed} failed" if num_failed else ""
    return f"{num_done} video{'' if num_done == 1 else 's'}{failed_text}"


def _format_number(value: float | None, number_format: str = "") -> str:
    return "-" if value is None else format(value, number_format)


def _format_line(row: Sequence[str], widths: Sequence[int], max_width: int) -> str:
    cells = []
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        cell = _truncate_text(cell, width)
        padding = " " * (width - _measure_width(cell))
        cells.append(cell + padding if column in _LEFT_ALIGNED_COLUMNS else padding + cell)
    return _truncate_text("  ".join(cells).rstrip(), max_width)


def _measure_width(text: str) -> int:
    """Return the columns that a text takes in a terminal: 2 a wide character, 0 a combining one."""
    return sum(
        2
        if unicodedata.east_asian_width(character) in "WF"
        else not unicodedata.combining(character)
        for character in text
    )


def _truncate_text(text: str, width: int) -> str:
    if _measure_width(text) <= width:
        return text
    while text and _measure_width(text) > width - 1:
        text = text[:-1]
    return f"{text}…"
