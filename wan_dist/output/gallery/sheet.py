"""Contact sheet of a video: frames from its beginning to its end in one small JPEG."""

import io
import subprocess
from pathlib import Path

import imageio_ffmpeg
from PIL import Image, UnidentifiedImageError

from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.ffmpeg import describe_failure, find_ffmpeg

SHEET_COLUMNS, SHEET_ROWS = 4, 2
_MAX_FRAME_PIXELS = 320
"""Pixels of a frame's longer side, at most."""
_SHEET_COMMENT = b"wan-dist contact sheet"
_FFMPEG_TIMEOUT_SECONDS = 300
"""Seconds that ffmpeg may take."""


class SheetError(RuntimeError):
    """The contact sheet could not be made."""


def get_sheet_path(video: Path) -> Path:
    """Return the path of a video's sheet, which is beside it."""
    return video.with_name(f"{video.name.removesuffix(video.suffix)}.jpg")


def has_current_sheet(video: Path) -> bool:
    """Whether a video has a sheet that is not older than it.

    Also True for a picture of that name of another origin, which must not be overwritten.
    """
    sheet_path = get_sheet_path(video)
    try:
        if sheet_path.stat().st_mtime_ns >= video.stat().st_mtime_ns:
            return True
        with Image.open(sheet_path) as image:
            return image.info.get("comment") != _SHEET_COMMENT
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def write_sheet(video: Path, sheet_path: Path, *, num_frames: int | None = None) -> None:
    """Write 8 frames, evenly spaced from the first to the last, as a JPEG of 4 x 2, at most 1280 pixels wide.

    A video of fewer frames fills fewer cells; a PNG gives a picture of at most 640 pixels. ``num_frames`` are
    counted where they are not given. ``sheet_path`` appears when it is complete. Raises SheetError.
    """
    try:
        sheet_image = (
            _make_thumbnail(video)
            if video.suffix.lower() == ".png"
            else _tile_frames(video, num_frames)
        )
        with atomic_write(sheet_path) as temporary_path:
            sheet_image.save(
                temporary_path, "JPEG", quality=82, optimize=True, comment=_SHEET_COMMENT
            )
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as fault:
        raise SheetError(f"cannot make {sheet_path}: {fault}") from fault


def _make_thumbnail(picture_path: Path) -> Image.Image:
    with Image.open(picture_path) as image:
        image.thumbnail((2 * _MAX_FRAME_PIXELS, 2 * _MAX_FRAME_PIXELS))
        return image.convert("RGB")


def _tile_frames(video: Path, num_frames: int | None) -> Image.Image:
    try:
        num_frames = num_frames or imageio_ffmpeg.count_frames_and_secs(str(video.absolute()))[0]
        ffmpeg = find_ffmpeg()
    except RuntimeError as fault:
        raise SheetError(
            f"cannot make a contact sheet of {video}: it cannot be read as a video"
        ) from fault
    num_cells = SHEET_COLUMNS * SHEET_ROWS
    frame_indices = (
        sorted(
            {
                round(cell_index * (num_frames - 1) / (num_cells - 1))
                for cell_index in range(num_cells)
            }
        )
        if num_frames > 1
        else [0]
    )
    columns = min(SHEET_COLUMNS, len(frame_indices))
    select_expression = "+".join(rf"eq(n\,{frame_index})" for frame_index in frame_indices)
    scale_filter = (
        f"scale='min({_MAX_FRAME_PIXELS},iw)':'min({_MAX_FRAME_PIXELS},ih)'"
        ":force_original_aspect_ratio=decrease:force_divisible_by=2"
    )
    rows = -(-len(frame_indices) // columns)
    filter_chain = f"select={select_expression},{scale_filter},tile={columns}x{rows}"
    input_options = ["-nostdin", "-loglevel", "error", "-i", f"file:{video.absolute()}"]
    output_options = ["-vf", filter_chain, "-frames:v", "1", "-f", "image2pipe", "-c:v", "ppm", "-"]
    try:
        result = subprocess.run(
            [ffmpeg, *input_options, *output_options],
            capture_output=True,
            timeout=_FFMPEG_TIMEOUT_SECONDS,
            check=False,
            process_group=0,
        )
    except subprocess.TimeoutExpired as fault:
        raise SheetError(
            f"cannot make a contact sheet of {video}: ffmpeg took more than {_FFMPEG_TIMEOUT_SECONDS} s"
        ) from fault
    if result.returncode or not result.stdout:
        failure = describe_failure(result.stderr, result.returncode)
        raise SheetError(f"cannot make a contact sheet of {video}: {failure}")
    return Image.open(io.BytesIO(result.stdout))
