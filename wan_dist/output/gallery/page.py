"""Gallery page of a folder's records, ``index.html``.

It needs no network, and no files but those beside it.
"""

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote_from_bytes

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from wan_dist.config.video_formats import VIDEO_FORMATS
from wan_dist.output.gallery.again import build_rerun_command
from wan_dist.output.gallery.records import GalleryVideo, read_records
from wan_dist.output.gallery.runs import RunRecord, read_runs
from wan_dist.output.gallery.sheet import (
    SHEET_COLUMNS,
    SHEET_ROWS,
    SheetError,
    get_sheet_path,
    has_current_sheet,
    write_sheet,
)
from wan_dist.output.gallery.source_copy import (
    FOLDER_NAME,
    SourceCopyError,
    get_copy_path,
    write_missing_copy,
)
from wan_dist.output.gallery.sweeps import Sweep, find_sweeps
from wan_dist.output.gallery.timeline import build_timeline
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.durations import format_duration

_TEMPLATE_FOLDER = Path(__file__).parent / "templates"
_STYLE_NAMES = ("base", "cards", "compare", "runs")
_SCRIPT_NAMES = ("core", "cards", "filters", "compare", "runs", "start")
_MAX_TOTAL_BARS, _MIN_BARS_PER_RUN = 6_000, 200
"""Bars of all timelines together at most, and of one run at least."""


def write_page(folder: Path, records: Sequence[GalleryVideo] | None = None) -> Path:
    """Write FOLDER/index.html, after missing contact sheets and copies of source videos; return its path.

    The page appears when it is complete. ``records`` are the folder's, if they have been read. A video that
    cannot be read is shown without a sheet. Raises InputError where there is no such folder, and OSError
    where it cannot be written to.
    """
    if records is None:
        records = read_records(folder)
    runs = read_runs(folder)
    _write_missing_sheets(records)
    _write_missing_copies(folder, records)
    page_path = folder / "index.html"
    with atomic_write(page_path) as temporary_path:
        temporary_path.write_text(
            _render_page(folder.resolve().name or "Videos", records, runs),
            encoding="utf-8",
            errors="replace",
        )
    return page_path


def _write_missing_copies(folder: Path, records: Sequence[GalleryVideo]) -> None:
    """Write the copies of source videos that are missing, once for each content."""
    sources = {
        record.source["sha256"]: record.source
        for record in records
        if record.source is not None and record.video is not None
    }
    for source in sources.values():
        with suppress(SourceCopyError):  # the page says that the source is not here
            write_missing_copy(folder, source)


def _write_missing_sheets(records: Sequence[GalleryVideo]) -> None:
    records_without_sheet = [
        record
        for record in records
        if record.video is not None and not has_current_sheet(record.video)
    ]
    if records_without_sheet:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as executor:
            list(executor.map(_write_sheet, records_without_sheet))


def _write_sheet(record: GalleryVideo) -> None:
    assert record.video is not None
    try:
        write_sheet(record.video, get_sheet_path(record.video), num_frames=record.num_frames)
    except SheetError:
        return  # the page shows the video without a sheet


def _render_page(title: str, records: Sequence[GalleryVideo], runs: Sequence[RunRecord]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        "\n".join(
            (_TEMPLATE_FOLDER / f"{name}.{suffix}.j2").read_text(encoding="utf-8") for name in names
        )
        for names, suffix in ((_STYLE_NAMES, "css"), (_SCRIPT_NAMES, "js"))
    )
    max_bars = max(_MIN_BARS_PER_RUN, _MAX_TOTAL_BARS // max(1, len(runs)))
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=_format_summary(records),
        policy=_build_security_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_serialize_for_script(build_page_data(records, find_sweeps(records)))),
        timelines=[build_timeline(run, max_bars) for run in reversed(runs)],
        num_videos=len(records),
    )


def build_page_data(records: Sequence[GalleryVideo], sweeps: Sequence[Sweep]) -> dict[str, object]:
    """Return the data of the page's script: videos, and sweeps as grids of their indices."""
    sweep_grids = [
        {
            "rows": sweep.row_setting,
            "columns": sweep.column_setting,
            "across": sweep.column_values,
            "down": sweep.row_values,
            "cells": sweep.cells,
        }
        for sweep in sweeps
    ]
    return {
        "videos": [_describe_video(record) for record in records],
        "sweeps": sweep_grids,
        "sheet": [SHEET_COLUMNS, SHEET_ROWS],
    }


def _describe_video(record: GalleryVideo) -> dict[str, object]:
    sheet_path = get_sheet_path(record.video) if record.video is not None else None
    has_sheet = sheet_path is not None and sheet_path.is_file() and not sheet_path.is_symlink()
    shift, guide_scale = (
        record.settings.get("sample.shift"),
        record.settings.get("sample.guide_scale"),
    )
    frame_size = (record.width, record.height)
    if sheet_path is not None and has_sheet and None in frame_size:
        frame_size = _read_frame_size(sheet_path, record)
    is_available = record.video is not None or record.status == "failed"
    status = record.status if is_available else "gone"
    # a text, as numbers in JavaScript do not hold 64 bits
    video_format = VIDEO_FORMATS.get(str(record.settings.get("output.video")))
    seed_text = None if record.seed is None else str(record.seed)
    return {
        "name": record.name,
        "url": _build_relative_url(record.video),
        "source": _describe_source(record),
        "sheet": _build_relative_url(sheet_path) if has_sheet else None,
        "picture": record.video is not None and record.video.suffix == ".png",
        "note": "" if video_format is None else video_format.playback_note,
        "plays": video_format is None or video_format.is_playable,
        "status": status,
        "error": record.error,
        "width": frame_size[0],
        "height": frame_size[1],
        "frames": record.num_frames,
        "seed": seed_text,
        "solver": str(record.settings.get("sample.solver") or ""),
        "guide": None if guide_scale is None else json.dumps(guide_scale),
        "shift": None if shift is None else json.dumps(shift),
        "lossy": record.lossy_options,
        "peak": record.peak_memory,
        "command": build_rerun_command(record),
    } | {
        key: getattr(record, key)
        for key in (
            "prompt",
            "task",
            "fps",
            "steps",
            "seconds",
            "step_seconds",
            "tflops",
            "began",
            "run",
        )
    }


def _describe_source(record: GalleryVideo) -> dict[str, object] | None:
    """Return the name of a record's source video, and the URL of its copy if there is one."""
    if record.source is None:
        return None
    copy_path = get_copy_path(record.path.parent, record.source)
    has_copy = copy_path.is_file() and not copy_path.is_symlink()
    name = f"{record.source['setting']}={Path(record.source['file']).name}"
    url = f"./{FOLDER_NAME}/{copy_path.name}" if has_copy else None
    return {"name": name, "url": url}


def _build_relative_url(path: Path | None) -> str | None:
    """Return the URL of a file relative to the page, which is in the same folder."""
    return None if path is None else "./" + quote_from_bytes(os.fsencode(path.name), safe="")


def _read_frame_size(sheet_path: Path, record: GalleryVideo) -> tuple[int | None, int | None]:
    try:
        with Image.open(sheet_path) as image:
            width, height = image.size
    except (OSError, ValueError):
        return None, None
    return (
        (width, height)
        if record.video is not None and record.video.suffix == ".png"
        else (width // SHEET_COLUMNS, height // SHEET_ROWS)
    )


def _format_summary(records: Sequence[GalleryVideo]) -> str:
    num_failed = sum(record.status == "failed" for record in records)
    seconds = sum(record.seconds or 0 for record in records)
    count_text = f"{len(records) - num_failed} video{'' if len(records) - num_failed == 1 else 's'}"
    return ", ".join(
        [
            count_text,
            *([f"{num_failed} failed"] if num_failed else []),
            f"{format_duration(seconds)} of work",
            time.strftime("%d %b %Y, %H:%M"),
        ]
    )


def _serialize_for_script(data: object) -> str:
    """Return JSON that can neither end the script element it is in nor begin a comment there."""
    # ASCII only, so no U+2028 either, which ends a line in JavaScript
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _build_security_policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy.

    It allows this style, this script, and images and videos from the page's folder, nothing else.
    """
    content_hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, script)
    ]
    local_sources = "'self' file:"
    directives = [
        "default-src 'none'",
        f"style-src {content_hashes[0]}",
        f"script-src {content_hashes[1]}",
        f"img-src {local_sources}",
        f"media-src {local_sources}",
    ]
    return "; ".join([*directives, "base-uri 'none'", "form-action 'none'"])
