"""Source videos: what they hold, and their frames one at a time; no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import FfmpegError, read_frames, read_packets, read_shown_size
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file


@dataclass(frozen=True)
class VideoFacts:
    """Size of a video, upright, and when its frames are shown."""

    file: str
    width: int
    height: int
    intervals: tuple[tuple[float, float], ...]
    """When each frame begins and ends, in seconds from the first one's beginning."""

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return len(self.intervals)

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return self.intervals[-1][1]


@dataclass(frozen=True)
class SourceVideo:
    """The frames that a task takes from a source video, and from the mask of it."""

    video: VideoFacts
    mask: VideoFacts | None
    size: tuple[int, int]
    """(width, height) that the frames are scaled and cut to."""
    frame_indices: tuple[int, ...]

    @property
    def description(self) -> str:
        """What of the source video is used, in one line."""
        video, mask, (width, height) = self.video, self.mask, self.size
        is_cut = mask is not None and 1 < mask.num_frames < video.num_frames
        cut_text = (
            f" (the first {mask.num_frames}, as src_mask has no more)" if mask and is_cut else ""
        )
        return (
            f"src_video has {video.num_frames} frames{cut_text} of {video.width}x{video.height} in "
            f"{video.seconds:.1f} s, of which {len(self.frame_indices)} are taken, evenly spaced, as "
            f"{width}x{height}: size is an area here, and frame_num is not used"
        )

    @property
    def mask_indices(self) -> tuple[int, ...]:
        """The frames of the mask: those of the video, or its only one for all."""
        if self.mask is not None and self.mask.num_frames == 1:
            return (0,) * len(self.frame_indices)
        return self.frame_indices


def read_video_facts(file: str, key: str) -> VideoFacts:
    """Return what a video file holds; raises InputError, naming the setting ``key``, if it is no video."""
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
        status = path.stat()
        return _read_facts(file, str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    except (UnreadableFileError, OSError) as error:
        raise InputError(f"{key}={file}: there is no such file ({error})") from None
    except FfmpegError as error:
        raise InputError(
            f"{key}={file} cannot be read as a video: {error}; mp4, mkv, webm, mov and gif can"
        ) from None


@lru_cache(64)
def _read_facts(file: str, path: str, *_: int) -> VideoFacts:
    """Return the facts; the other arguments tell apart files that follow each other under one name."""
    width, height = read_shown_size(Path(path))
    intervals = read_packets(Path(path)).intervals
    first_time = intervals[0][0]
    return VideoFacts(
        file,
        width,
        height,
        tuple((start - first_time, end - first_time) for start, end in intervals),
    )


def iterate_frames(video: VideoFacts, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield frames (height, width, 3), uint8 RGB, at indices that never decrease; raises InputError."""
    try:
        for frame in read_frames(
            Path(video.file).expanduser(), (video.width, video.height), frame_indices
        ):
            yield np.frombuffer(frame, np.uint8).reshape(video.height, video.width, 3)
    except FfmpegError as error:
        raise InputError(f"{video.file} cannot be read as a video: {error}") from None
