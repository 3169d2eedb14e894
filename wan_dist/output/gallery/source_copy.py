"""Copy of a source video that a browser plays, in the folder of the results: one for each content."""

import subprocess
from pathlib import Path

from wan_dist.output.record import SourceEntry
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.ffmpeg import FfmpegError, describe_failure, find_ffmpeg
from wan_dist.runtime.file_hash import hash_unchanged_file
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

FOLDER_NAME = "sources"
_MAX_FRAME_PIXELS = 640
"""Pixels of a frame's longer side, at most."""
_MAX_SECONDS = 300
"""Of the video, from its beginning; ffmpeg may take as long."""


class SourceCopyError(RuntimeError):
    """The copy could not be made."""


def get_copy_path(folder: Path, source: SourceEntry) -> Path:
    """Return the path of a source's copy in a folder of results."""
    return folder / FOLDER_NAME / f"{source['sha256'][:16]}.mp4"


def write_missing_copy(folder: Path, source: SourceEntry) -> None:
    """Write a source's copy unless it is there: H.264 without sound, small, of the first five minutes.

    Raises SourceCopyError for a source that is gone, has changed, or cannot be read.
    """
    copy_path, path = get_copy_path(folder, source), Path(source["file"])
    if copy_path.is_file():
        return
    try:
        check_regular_file(path)
        if hash_unchanged_file(path) != source["sha256"]:
            raise SourceCopyError(f"{path} is no longer the video that it was")
        copy_path.parent.mkdir(exist_ok=True)
        with atomic_write(copy_path) as temporary_path:
            _transcode(path, temporary_path)
    except (OSError, UnreadableFileError, FfmpegError, subprocess.TimeoutExpired) as error:
        raise SourceCopyError(f"cannot copy {path}: {error}") from error


def _transcode(path: Path, copy_path: Path) -> None:
    scale_filter = (
        f"scale='min({_MAX_FRAME_PIXELS},iw)':'min({_MAX_FRAME_PIXELS},ih)'"
        ":force_original_aspect_ratio=decrease:force_divisible_by=2"
    )
    command = [
        *(find_ffmpeg(), "-v", "error", "-nostdin", "-y", "-protocol_whitelist", "file"),
        *("-i", f"file:{path.absolute()}", "-map", "0:v:0", "-t", str(_MAX_SECONDS)),
        *("-vf", scale_filter, "-c:v", "libx264", "-preset", "veryfast", "-crf", "20"),
        *("-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4", f"file:{copy_path}"),
    ]
    completed_process = subprocess.run(
        command, capture_output=True, timeout=_MAX_SECONDS, process_group=0, check=False
    )
    if completed_process.returncode:
        raise FfmpegError(describe_failure(completed_process.stderr, completed_process.returncode))
