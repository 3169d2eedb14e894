"""Animate: a character moves as the person in a driving video does, or takes that person's place.

The driving video is a folder of files that the reference's preprocessing writes; all of its frames are used,
in clips of which each starts from the last frames of the one before.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from wan_dist.config.loras import RELIGHTING_NAMES, RELIGHTING_REPOSITORY
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task, TaskInputs
from wan_dist.tasks.published_dims import DIMS_ANIMATE_14B, DIMS_ANIMATE_FACE, SIZES_720P
from wan_dist.tasks.source_video import VideoFacts, iterate_frames, read_video_facts

FOLDER_KEY = "src_root_path"
"""Setting of a folder that holds all input files."""
ANIMATION_KEYS = ("src_pose", "src_face", "src_ref")
REPLACEMENT_KEYS = ("src_bg", "src_mask")
_FILE_NAMES = {
    key: f"{key}.png" if key == "src_ref" else f"{key}.mp4"
    for key in (*ANIMATION_KEYS, *REPLACEMENT_KEYS)
}
MULTIPLE = 16
"""Pixels of which width and height are multiples: stride of the VAE times patch."""
_SAME_RATE = 0.02
"""Share by which rates may differ: 29.97 frames a second are 30."""
REPEATED_FRAMES = (1, 5)
"""Numbers of frames of a clip that the next one may start from."""


@dataclass(frozen=True)
class AnimateInputs(TaskInputs):
    """A driving video's poses, faces and, to replace a person, background and mask; a reference image."""

    kind: str = "animate"
    file_keys: tuple[str, ...] = (*ANIMATION_KEYS, *REPLACEMENT_KEYS)
    folder_key: str | None = FOLDER_KEY
    usage: str = (
        f"{FOLDER_KEY}=FOLDER, or src_pose=FILE src_face=FILE src_ref=FILE, with replace_flag=true "
        "also src_bg=FILE src_mask=FILE"
    )
    is_required: bool = True
    is_always_encoded: bool = True
    has_reference_frames: bool = True

    def choose_keys(self, given_keys: Collection[str]) -> tuple[str, ...]:
        """Return the settings that belong together, by those that are given."""
        is_replacing = not set(REPLACEMENT_KEYS).isdisjoint(given_keys)
        return self.file_keys if is_replacing else ANIMATION_KEYS


class ClipFrames(Protocol):
    """Frames of clips in a driving video."""

    def list_frames(self, clip_index: int) -> tuple[int, ...]:
        """Return a clip's frames."""
        ...


@dataclass(frozen=True)
class DrivingVideo:
    """Videos of a person, frame by frame, and the clips that are made from them."""

    pose: VideoFacts
    face: VideoFacts
    background: VideoFacts | None
    """Of replacement, as is the mask; None: the background is the reference image's."""
    mask: VideoFacts | None
    clip_frames: int
    """Frames of a clip."""
    num_repeated: int
    """Frames that a clip after the first has from the one before it."""

    @property
    def num_frames(self) -> int:
        """Frames of the video that is made: those of the driving video."""
        return self.pose.num_frames

    @property
    def num_clips(self) -> int:
        """Clips that it takes."""
        stride = self.clip_frames - self.num_repeated
        return max(1, -(-(self.num_frames - self.num_repeated) // stride))

    def find_first_frame(self, clip_index: int) -> int:
        """Return the index in the video of a clip's first frame, which the clip before has too."""
        return clip_index * (self.clip_frames - self.num_repeated)

    def count_frames(self, clip_index: int) -> int:
        """Return the number of frames of a clip."""
        return self.clip_frames

    def list_frames(self, clip_index: int) -> tuple[int, ...]:
        """Return a clip's frames in the driving video; after its end they run backwards, and so on."""
        start = self.find_first_frame(clip_index)
        period = max(1, 2 * (self.num_frames - 1))
        offsets = (index % period for index in range(start, start + self.clip_frames))
        return tuple(min(offset, period - offset) % period for offset in offsets)

    @property
    def description(self) -> str:
        """How the driving video is used, in one line."""
        num_made = self.num_clips * (self.clip_frames - self.num_repeated) + self.num_repeated
        num_left_out = num_made - self.num_frames
        beyond = (
            f", and {num_left_out} are made beyond the end and left out" if num_left_out else ""
        )
        return (
            f"src_pose has {self.num_frames} frames of {self.pose.width}x{self.pose.height}, which the video "
            f"has too, whatever size says; they are made in {self.num_clips} "
            f"clip{'s' * (self.num_clips > 1)} of {self.clip_frames}{beyond}"
        )

    def describe_rate(self, fps: int) -> str | None:
        """Return what another rate than the driving video's does to the result, None for the same one."""
        own_rate = self.num_frames / self.pose.seconds if self.pose.seconds > 0 else float(fps)
        if abs(fps / own_rate - 1) < _SAME_RATE:
            return None
        return (
            f"src_pose has {own_rate:.4g} frames a second and fps={fps}, so that the result moves "
            f"{fps / own_rate:.2g} times as fast; give fps={round(own_rate)} for the same"
        )


def list_folder_files(folder: str, *, is_replacing: bool) -> dict[str, str]:
    """Return the files in a folder by the settings that name them; whether they exist is not checked."""
    keys = (*ANIMATION_KEYS, *(REPLACEMENT_KEYS if is_replacing else ()))
    return {key: str(Path(folder) / _FILE_NAMES[key]) for key in keys}


def check_mode(given_keys: Collection[str], *, is_replacing: bool) -> None:
    """Raise InputError for files of replacement without it, and the other way round."""
    given = [key for key in REPLACEMENT_KEYS if key in given_keys]
    if given and not is_replacing:
        raise InputError(
            f"{' and '.join(given)} is given without replace_flag=true, which puts the character into "
            "the driving video; give replace_flag=true, or leave it out"
        )
    if is_replacing and (missing := [key for key in REPLACEMENT_KEYS if key not in given_keys]):
        raise InputError(
            f"replace_flag=true needs {' and '.join(f'{key}=FILE' for key in missing)}, or "
            f"{FOLDER_KEY}=FOLDER with all files"
        )


def read_driving_video(
    files: Mapping[str, str], *, clip_frames: int, num_repeated: int
) -> DrivingVideo:
    """Return the driving video of files by setting; raises InputError where they do not fit together."""
    if num_repeated not in REPEATED_FRAMES:
        raise InputError(
            f"refert_num={num_repeated}: the model knows clips that start from 1 or 5 frames of the one "
            "before; give refert_num=1 or refert_num=5"
        )
    if clip_frames <= num_repeated:
        raise InputError(
            f"frame_num={clip_frames} must be more than refert_num={num_repeated}, the frames that a "
            "clip has from the one before it"
        )
    videos = {key: read_video_facts(file, key) for key, file in files.items() if key != "src_ref"}
    pose, face = videos["src_pose"], videos["src_face"]
    if pose.width % MULTIPLE or pose.height % MULTIPLE:
        raise InputError(
            f"src_pose={pose.file} is {pose.width}x{pose.height}, and both must be multiples of "
            f"{MULTIPLE}; preprocess the driving video again with such a size"
        )
    if face.width != face.height:
        raise InputError(
            f"src_face={face.file} is {face.width}x{face.height}; its frames must be square, as the "
            "preprocessing writes them"
        )
    for key, video in videos.items():
        if video.num_frames != pose.num_frames:
            raise InputError(
                f"{key}={video.file} has {video.num_frames} frames and src_pose={pose.file} "
                f"{pose.num_frames}; they must be of the same frames, from one run of the preprocessing"
            )
        if key in REPLACEMENT_KEYS and (video.width, video.height) != (pose.width, pose.height):
            raise InputError(
                f"{key}={video.file} is {video.width}x{video.height} and src_pose={pose.file} "
                f"{pose.width}x{pose.height}; they must be of one size"
            )
    return DrivingVideo(
        pose, face, videos.get("src_bg"), videos.get("src_mask"), clip_frames, num_repeated
    )


def iterate_clip_frames(
    video: VideoFacts, driving: ClipFrames, clip_index: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yield a clip's frames (height, width, 3) of one of the driving videos, without its first ``skip``.

    One is in memory at a time, or where they run backwards all that do.
    """
    for run in _split_runs(driving.list_frames(clip_index)[skip:]):
        if run[0] <= run[-1]:
            yield from iterate_frames(video, run)
        else:
            yield from reversed(list(iterate_frames(video, run[::-1])))


def _split_runs(indices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield runs of indices that do not decrease, or that decrease."""
    start = 0
    for position, (index, next_index) in enumerate(pairwise(indices), 1):
        is_falling = position - start > 1 and indices[start] > indices[start + 1]
        if position - start > 1 and is_falling != (index > next_index):
            yield indices[start:position]
            start = position
    if start < len(indices):
        yield indices[start:]


TASKS = (
    Task(
        name="animate-14B",
        repository=RELIGHTING_REPOSITORY,
        lora_files=RELIGHTING_NAMES[:1],
        transformer_dims=DIMS_ANIMATE_14B,
        face_encoder_dims=DIMS_ANIMATE_FACE,
        inputs=AnimateInputs(),
        published_sizes=SIZES_720P,
    ),
)
