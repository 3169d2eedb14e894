"""A folder's records -> one page to look at them, ``index.html``: no network, nothing but the files beside it."""

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote_from_bytes

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from wan_dist.output.gallery.again import command
from wan_dist.output.gallery.records import Record, read_records
from wan_dist.output.gallery.runs import Run, read_runs
from wan_dist.output.gallery.sheet import COLUMNS, ROWS, SheetError, is_current, sheet_of, write_sheet
from wan_dist.output.gallery.sweeps import Sweep, find_sweeps
from wan_dist.output.gallery.timeline import timeline_of
from wan_dist.runtime.atomic_write import written_aside
from wan_dist.runtime.durations import duration

_TEMPLATES = Path(__file__).parent / "templates"
_STYLES = ("base", "cards", "compare", "runs")
_SCRIPTS = ("core", "cards", "filters", "compare", "runs", "start")
_MOST_BARS, _FEWEST_BARS = 6_000, 200
"""Of all timelines together, and of one."""


def write_page(folder: Path, records: Sequence[Record] | None = None) -> Path:
    """Write FOLDER/index.html, after the contact sheets that are missing, and return it; it appears when it is whole.

    ``records`` are the folder's, if they have been read. A video that cannot be read is shown without a sheet. Raises InputError where
    there is no such folder, and OSError where it cannot be written to.
    """
    records, runs = read_records(folder) if records is None else records, read_runs(folder)
    _write_sheets(records)
    to = folder / "index.html"
    with written_aside(to) as aside:
        aside.write_text(_page(folder.resolve().name or "Videos", records, runs), encoding="utf-8", errors="replace")
    return to


def _write_sheets(records: Sequence[Record]) -> None:
    missing = [record for record in records if record.video is not None and not is_current(record.video)]
    if missing:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as workers:
            list(workers.map(_write_sheet, missing))


def _write_sheet(record: Record) -> None:
    assert record.video is not None
    try:
        write_sheet(record.video, sheet_of(record.video), num_frames=record.num_frames)
    except SheetError:
        return  # the page does without


def _page(title: str, records: Sequence[Record], runs: Sequence[Run]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (
        "\n".join((_TEMPLATES / f"{name}.{kind}.j2").read_text(encoding="utf-8") for name in names)
        for names, kind in ((_STYLES, "css"), (_SCRIPTS, "js"))
    )
    most = max(_FEWEST_BARS, _MOST_BARS // max(1, len(runs)))
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=_summary(records),
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_embedded(data_of(records, find_sweeps(records)))),
        timelines=[timeline_of(run, most) for run in reversed(runs)],
        num_videos=len(records),
    )


def data_of(records: Sequence[Record], sweeps: Sequence[Sweep]) -> dict[str, object]:
    """Return what the page's script reads: videos, and grids of their numbers."""
    grids = [
        {"rows": sweep.rows, "columns": sweep.columns, "across": sweep.column_values, "down": sweep.row_values, "cells": sweep.cells}
        for sweep in sweeps
    ]
    return {"videos": [_video(record) for record in records], "sweeps": grids, "sheet": [COLUMNS, ROWS]}


def _video(record: Record) -> dict[str, object]:
    sheet = sheet_of(record.video) if record.video is not None else None
    has_sheet = sheet is not None and sheet.is_file() and not sheet.is_symlink()
    shift, guide = record.settings.get("sample.shift"), record.settings.get("sample.guide_scale")
    shape = (record.width, record.height)
    if sheet is not None and has_sheet and None in shape:
        shape = _shape_of(sheet, record)
    return {
        "name": record.name,
        "source": _address(record.video),
        "sheet": _address(sheet) if has_sheet else None,
        "picture": record.video is not None and record.video.suffix == ".png",
        "status": record.status if record.video is not None or record.status == "failed" else "gone",
        "error": record.error,
        "width": shape[0],
        "height": shape[1],
        "frames": record.num_frames,
        "seed": None if record.seed is None else str(record.seed),  # of 64 bits, which a script's numbers do not hold
        "solver": str(record.settings.get("sample.solver") or ""),
        "guide": None if guide is None else json.dumps(guide),
        "shift": None if shift is None else json.dumps(shift),
        "lossy": record.distance,
        "peak": record.peak,
        "command": command(record),
    } | {key: getattr(record, key) for key in ("prompt", "task", "fps", "steps", "seconds", "step_seconds", "tflops", "began", "run")}


def _address(file: Path | None) -> str | None:
    """Return a file's address from the page, which lies beside it."""
    return None if file is None else "./" + quote_from_bytes(os.fsencode(file.name), safe="")


def _shape_of(sheet: Path, record: Record) -> tuple[int | None, int | None]:
    try:
        with Image.open(sheet) as image:
            width, height = image.size
    except (OSError, ValueError):
        return None, None
    return (width, height) if record.video is not None and record.video.suffix == ".png" else (width // COLUMNS, height // ROWS)


def _summary(records: Sequence[Record]) -> str:
    failed = sum(record.status == "failed" for record in records)
    seconds = sum(record.seconds or 0 for record in records)
    count = f"{len(records) - failed} video{'' if len(records) - failed == 1 else 's'}"
    return ", ".join([count, *([f"{failed} failed"] if failed else []), f"{duration(seconds)} of work", time.strftime("%d %b %Y, %H:%M")])


def _embedded(data: object) -> str:
    """Return JSON that can neither end the element it is in nor begin a comment there."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))  # only ASCII: also no U+2028
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy: this style, this script, pictures and videos from beside the page, and nothing else."""
    own = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)]
    here = "'self' file:"
    rules = ["default-src 'none'", f"style-src {own[0]}", f"script-src {own[1]}", f"img-src {here}", f"media-src {here}"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])
