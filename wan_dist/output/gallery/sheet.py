"""A video -> a contact sheet: frames from its beginning to its end in one small JPEG."""

import io
import subprocess
from pathlib import Path

import imageio_ffmpeg
from PIL import Image, UnidentifiedImageError

from wan_dist.runtime.atomic_write import written_aside

COLUMNS, ROWS = 4, 2
_CELL = 320
"""The most pixels of a frame's longer side."""
_OURS = b"wan-dist contact sheet"
_LIMIT = 300
"""Seconds that ffmpeg may take."""


class SheetError(RuntimeError):
    """The contact sheet could not be made."""


def sheet_of(video: Path) -> Path:
    """Return where a video's sheet lies: beside it."""
    return video.with_name(f"{video.name.removesuffix(video.suffix)}.jpg")


def is_current(video: Path) -> bool:
    """Whether a video has a sheet that is no older than it, or a picture of that name which is not ours to write."""
    sheet = sheet_of(video)
    try:
        if sheet.stat().st_mtime_ns >= video.stat().st_mtime_ns:
            return True
        with Image.open(sheet) as image:
            return image.info.get("comment") != _OURS
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def write_sheet(video: Path, to: Path, *, num_frames: int | None = None) -> None:
    """Write 8 frames, evenly spaced from the first to the last, as a JPEG of 4 x 2 of at most 1280 pixels across.

    A video of fewer frames fills fewer places; a PNG gives a picture of at most 640 pixels. ``num_frames`` are counted where they are
    not given. ``to`` appears when it is whole. Raises SheetError.
    """
    try:
        sheet = _thumbnail(video) if video.suffix.lower() == ".png" else _tiled(video, num_frames)
        with written_aside(to) as aside:
            sheet.save(aside, "JPEG", quality=82, optimize=True, comment=_OURS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as fault:
        raise SheetError(f"cannot make {to}: {fault}") from fault


def _thumbnail(picture: Path) -> Image.Image:
    with Image.open(picture) as image:
        image.thumbnail((2 * _CELL, 2 * _CELL))
        return image.convert("RGB")


def _tiled(video: Path, num_frames: int | None) -> Image.Image:
    try:
        num_frames = num_frames or imageio_ffmpeg.count_frames_and_secs(str(video.absolute()))[0]
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as fault:
        raise SheetError(f"cannot make a sheet of {video}: it cannot be read as a video") from fault
    places = COLUMNS * ROWS
    chosen = sorted({round(place * (num_frames - 1) / (places - 1)) for place in range(places)}) if num_frames > 1 else [0]
    columns = min(COLUMNS, len(chosen))
    picked = "+".join(rf"eq(n\,{frame})" for frame in chosen)
    scaled = f"scale='min({_CELL},iw)':'min({_CELL},ih)':force_original_aspect_ratio=decrease:force_divisible_by=2"
    tiled = f"select={picked},{scaled},tile={columns}x{-(-len(chosen) // columns)}"
    command = [ffmpeg, "-nostdin", "-loglevel", "error", "-i", f"file:{video.absolute()}", "-vf", tiled, "-frames:v", "1"]
    try:
        done = subprocess.run(
            [*command, "-f", "image2pipe", "-c:v", "ppm", "-"], capture_output=True, timeout=_LIMIT, check=False, process_group=0
        )
    except subprocess.TimeoutExpired as fault:
        raise SheetError(f"cannot make a sheet of {video}: ffmpeg took more than {_LIMIT} s") from fault
    if done.returncode or not done.stdout:
        last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SheetError(f"cannot make a sheet of {video}: ffmpeg says {' '.join(last_words) or 'nothing'} (exit code {done.returncode})")
    return Image.open(io.BytesIO(done.stdout))
