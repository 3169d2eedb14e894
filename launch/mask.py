"""Write the source video and the mask of a vace task: what is kept, and what is to be generated.

    python -m launch mask extend video=clip.mp4 frames=80
    python -m launch mask inpaint video=clip.mp4 box=300,200,120x80
    python -m launch mask outpaint video=clip.mp4 size=1280x720
    python -m launch mask frames first=a.png last=b.png frames=81

  extend    the video, and new frames after it; before=80 for frames before it instead
  inpaint   a box of the video anew: X,Y of its corner, WIDTHxHEIGHT
  outpaint  a larger picture around the video; at=X,Y is where the video lies in it, else its middle
  frames    a first image, a last one, or both, and the frames between

Written are src_video.mp4 and src_mask.mp4, without loss, into output=FOLDER (default: inputs). Masks from
other programs can be used as well: white is generated, black is kept.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from launch.arguments import expand_user_path, parse_count, split_arguments
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.images import crop_to_cover, read_image
from wan_dist.tasks.source_video import VideoFacts, iterate_frames, read_video_facts

Picture = NDArray[np.uint8]
"""(height, width, 3)."""
_GREY, _GENERATE, _KEEP = 128, 255, 0
_DEFAULT_FPS = 16.0
_KEYS = {
    "extend": ("video", "frames", "before"),
    "inpaint": ("video", "box"),
    "outpaint": ("video", "size", "at"),
    "frames": ("first", "last", "frames"),
}
"""Keys of each kind, beside output."""


@dataclass(frozen=True)
class _Inputs:
    """A source video and its mask, frame by frame."""

    size: tuple[int, int]
    fps: float
    frames: Iterator[tuple[Picture, Picture]]


def main(arguments: list[str]) -> None:
    """Write both videos and print the settings that name them; raises InputError."""
    kind, *rest = arguments or [""]
    if kind not in _MAKERS:
        raise InputError(f"mask takes one of {', '.join(_MAKERS)} first; see mask --help")
    keys = (*_KEYS[kind], "output")
    values, unknown = split_arguments(rest, keys)
    if unknown:
        raise InputError(
            f"mask {kind} takes {'=..., '.join(keys)}=...; {unknown[0]} is none of them"
        )
    inputs = _MAKERS[kind](values)
    folder = expand_user_path("output", values.get("output", "inputs"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={folder} cannot be made: {error.strerror}") from None
    files = [folder / "src_video.mp4", folder / "src_mask.mp4"]
    num_frames = _write_videos(files, inputs)
    width, height = inputs.size
    sys.stdout.write(
        f"{num_frames} frames of {width}x{height}\n"
        f"src_video={shlex.quote(str(files[0]))} src_mask={shlex.quote(str(files[1]))}\n"
    )


def _extend(values: dict[str, str]) -> _Inputs:
    video = _read_video("extend", values)
    num_before, num_after = (
        parse_count(key, values[key], "frames") if key in values else 0
        for key in ("before", "frames")
    )
    if not num_before and not num_after:
        raise InputError("how many frames are to be added? Give frames=80, or before=80")
    kept = _make_picture(video, _KEEP)
    new = (_make_picture(video, _GREY), _make_picture(video, _GENERATE))
    shown = ((frame, kept) for frame in iterate_frames(video, range(video.num_frames)))
    frames = chain(repeat(new, num_before), shown, repeat(new, num_after))
    return _Inputs((video.width, video.height), _find_fps(video), frames)


def _inpaint(values: dict[str, str]) -> _Inputs:
    video = _read_video("inpaint", values)
    match = re.fullmatch(r"(\d+),(\d+),(\d+)[x*](\d+)", values.get("box", ""))
    if match is None:
        raise InputError(
            f"box={values.get('box', '')} is not X,Y,WIDTHxHEIGHT, e.g. box=300,200,120x80"
        )
    x, y, width, height = map(int, match.groups())
    if not width * height or x + width > video.width or y + height > video.height:
        raise InputError(
            f"box={values['box']} is not inside the video of {video.width}x{video.height}"
        )
    mask = _make_picture(video, _KEEP)
    mask[y : y + height, x : x + width] = _GENERATE
    frames = (
        (np.where(mask == _GENERATE, np.uint8(_GREY), frame), mask)
        for frame in iterate_frames(video, range(video.num_frames))
    )
    return _Inputs((video.width, video.height), _find_fps(video), frames)


def _outpaint(values: dict[str, str]) -> _Inputs:
    video = _read_video("outpaint", values)
    width, height = _parse_pair(
        values, "size", r"(\d+)[x*](\d+)", "WIDTHxHEIGHT, e.g. size=1280x720"
    )
    if width < video.width or height < video.height:
        raise InputError(
            f"size={values['size']} is smaller than the video of {video.width}x{video.height}"
        )
    left, top = (width - video.width) // 2, (height - video.height) // 2
    if "at" in values:
        left, top = _parse_pair(values, "at", r"(\d+),(\d+)", "X,Y, e.g. at=0,0")
    if left + video.width > width or top + video.height > height:
        raise InputError(f"at={values['at']}: the video would reach beyond size={values['size']}")
    inside = np.s_[top : top + video.height, left : left + video.width]
    mask = np.full((height, width, 3), _GENERATE, np.uint8)
    mask[inside] = _KEEP

    def place(frame: Picture) -> Picture:
        picture = np.full((height, width, 3), _GREY, np.uint8)
        picture[inside] = frame
        return picture

    frames = ((place(frame), mask) for frame in iterate_frames(video, range(video.num_frames)))
    return _Inputs((width, height), _find_fps(video), frames)


def _join_frames(values: dict[str, str]) -> _Inputs:
    given = [key for key in ("first", "last") if key in values]
    if not given:
        raise InputError("no image is given: first=FILE, last=FILE, or both")
    num_frames = parse_count("frames", values.get("frames", "81"), "frames")
    if num_frames <= len(given):
        raise InputError(f"frames={num_frames} leaves none to generate")
    images = {key: read_image(values[key], key) for key in given}
    size = images[given[0]].size
    kept = np.full((size[1], size[0], 3), _KEEP, np.uint8)
    ends = {key: (np.asarray(crop_to_cover(image, size)), kept) for key, image in images.items()}
    new = (np.full_like(kept, _GREY), np.full_like(kept, _GENERATE))
    frames = [ends.get("first", new), *([new] * (num_frames - 2)), ends.get("last", new)]
    return _Inputs(size, _DEFAULT_FPS, iter(frames))


_MAKERS: dict[str, Callable[[dict[str, str]], _Inputs]] = {
    "extend": _extend,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "frames": _join_frames,
}


def _read_video(kind: str, values: dict[str, str]) -> VideoFacts:
    if "video" not in values:
        raise InputError(f"video=FILE is missing; it takes {'=..., '.join(_KEYS[kind])}=...")
    return read_video_facts(values["video"], "video")


def _parse_pair(values: dict[str, str], key: str, pattern: str, form: str) -> tuple[int, int]:
    match = re.fullmatch(pattern, values.get(key, ""))
    if match is None:
        raise InputError(f"{key}={values.get(key, '')} is not {form}")
    return int(match[1]), int(match[2])


def _make_picture(video: VideoFacts, value: int) -> Picture:
    return np.full((video.height, video.width, 3), value, np.uint8)


def _find_fps(video: VideoFacts) -> float:
    return video.num_frames / video.seconds if video.seconds > 0 else _DEFAULT_FPS


def _write_videos(files: list[Path], inputs: _Inputs) -> int:
    """Write the source video and its mask as H.264 in RGB, without loss; return the number of frames."""
    writers = [
        imageio_ffmpeg.write_frames(
            str(file),
            inputs.size,
            fps=inputs.fps,
            codec="libx264rgb",
            quality=None,
            pix_fmt_out="rgb24",
            macro_block_size=1,
            output_params=["-crf", "0", "-preset", "veryfast"],
        )
        for file in files
    ]
    num_frames = 0
    try:
        for writer in writers:
            writer.send(None)
        for pictures in inputs.frames:
            for writer, picture in zip(writers, pictures, strict=True):
                writer.send(np.ascontiguousarray(picture))
            num_frames += 1
    except OSError as error:
        raise InputError(f"{files[0].parent} cannot be written to: {error}") from None
    finally:
        for writer in writers:
            writer.close()
    return num_frames
