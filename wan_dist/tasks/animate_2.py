"""Animate-2: a character of a reference image does what a person in any video does.

The driving video is taken as it is: at a rate, scaled to fit, and lengthened to whole clips by walking back
and forth. Rules are those of the release (Wan-Video/Wan-Animate-2).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task, TaskInputs
from wan_dist.tasks.letterbox import compute_fitted_size
from wan_dist.tasks.published_dims import DIMS_I2V_14B, SIZES_720P
from wan_dist.tasks.source_video import VideoFacts

MULTIPLE = 16
"""Pixels of which width and height are multiples: stride of the VAE times patch."""
_MIN_CLIP_FRAMES = 29
"""Of the last clip, which may be shorter than others of more frames."""
INPUT_KEYS = ("src_video", "src_ref")


@dataclass(frozen=True)
class Animate2Inputs(TaskInputs):
    """A driving video, and the image of the character."""

    kind: str = "animate_2"
    file_keys: tuple[str, ...] = INPUT_KEYS
    usage: str = "src_video=FILE src_ref=FILE"
    is_required: bool = True
    is_always_encoded: bool = True
    has_reference_frames: bool = True

    def choose_keys(self, given_keys: Collection[str]) -> tuple[str, ...]:
        """Return both settings."""
        return self.file_keys


@dataclass(frozen=True)
class FollowedVideo:
    """The frames of a driving video that a character follows, and the clips that are made from them."""

    video: VideoFacts
    frame_indices: tuple[int, ...]
    """Of the frames at the rate of the result, each of which becomes one of its frames."""
    driving_size: tuple[int, int]
    """(width, height) that they are scaled to fit into."""
    size: tuple[int, int]
    """(width, height) of the clips, into which the image of the character is fitted."""
    crop_size: tuple[int, int]
    """(width, height) of the result: without the black around the image."""
    requested_area: int
    clip_frames: int
    """Frames of a clip; the last one may have fewer."""
    num_repeated: int = 1
    """Frames that a clip after the first has from the one before it."""

    @property
    def num_frames(self) -> int:
        """Frames of the result."""
        return len(self.frame_indices)

    @property
    def num_lengthened(self) -> int:
        """Frames of all clips together: 1 to 28 more than there are."""
        remainder = (self.num_frames - 1) % (self.clip_frames - 1)
        shortest = _MIN_CLIP_FRAMES - 1
        return self.num_frames + (
            shortest - remainder if remainder < shortest else 4 - remainder % 4
        )

    @cached_property
    def clips(self) -> tuple[tuple[int, int], ...]:
        """First frame and number of frames of each clip, but for one that would be cut off entirely."""
        clips = []
        start = 0
        while start + 1 < (self.num_frames if start else self.num_lengthened):
            length = min(self.clip_frames, self.num_lengthened - start)
            clips.append((start, length))
            start += length - self.num_repeated
        return tuple(clips)

    @property
    def num_clips(self) -> int:
        """Clips that are made."""
        return len(self.clips)

    def find_first_frame(self, clip_index: int) -> int:
        """Return the index of a clip's first frame in the result."""
        return self.clips[clip_index][0]

    def count_frames(self, clip_index: int) -> int:
        """Return the number of frames of a clip."""
        return self.clips[clip_index][1]

    @property
    def slot_tokens(self) -> int:
        """Tokens of a frame of the requested area."""
        return self.requested_area // MULTIPLE**2

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame of the driving video."""
        width, height = self.driving_size
        return width * height // MULTIPLE**2

    @property
    def num_tokens(self) -> int:
        """Tokens of the driving video of the longest clip."""
        return ((self.clips[0][1] - 1) // 4 + 1) * self.frame_tokens

    @property
    def description(self) -> str:
        """How the driving video is used, in one line."""
        width, height = self.driving_size
        num_left_out = self.clips[-1][0] + self.clips[-1][1] - self.num_frames
        return (
            f"src_video has {self.video.num_frames} frames of {self.video.width}x{self.video.height} in "
            f"{self.video.seconds:.1f} s, of which {self.num_frames} are taken as {width}x{height}; they are "
            f"made in {self.num_clips} clip{'s' * (self.num_clips > 1)}, and {num_left_out} frames are made "
            f"beyond the end and left out"
        )

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the result in a clip: without the black around the image."""
        left, top = (
            (size - kept) // 2 for size, kept in zip(self.size, self.crop_size, strict=True)
        )
        # H.264 wants even sides.
        width, height = (kept // 2 * 2 for kept in self.crop_size)
        return left, top, left + width, top + height

    def list_frames(self, clip_index: int) -> tuple[int, ...]:
        """Return a clip's frames in the driving video; after its end they run backwards, and so on."""
        start, length = self.clips[clip_index]
        period = 2 * (self.num_frames - 1)
        offsets = (index % period for index in range(start, start + length))
        return tuple(self.frame_indices[min(offset, period - offset)] for offset in offsets)


def take_frames(video: VideoFacts, fps: int) -> tuple[int, ...]:
    """Return the indices of a video's frames at another rate; raises InputError for fewer than two."""
    rate = round(video.num_frames / video.seconds, 6) if video.seconds > 0 else float(fps)
    num_taken = int(video.num_frames / rate * fps)
    if num_taken < 2:
        raise InputError(
            f"src_video={video.file} has {video.num_frames} frames at {rate:g} fps, of which fps={fps} "
            f"takes {num_taken}; a driving video needs two or more"
        )
    last = video.num_frames - 1
    return tuple(min(round(index / fps * rate), last) for index in range(num_taken))


def fit_area(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Return (width, height) of about ``area`` pixels, in multiples of 16, for an image of ``size``."""
    aspect = size[0] / size[1]
    height = (area / aspect) ** 0.5
    width = area / height
    return int(width) // MULTIPLE * MULTIPLE, int(height) // MULTIPLE * MULTIPLE


def follow_video(
    video: VideoFacts,
    reference_size: tuple[int, int],
    *,
    requested_size: tuple[int, int],
    clip_frames: int,
    fps: int,
) -> FollowedVideo:
    """Return how a character follows a video; raises InputError where that does not work.

    ``reference_size``: (width, height) of the character's image. It and the video are each scaled to the area
    of ``requested_size``.
    """
    area = requested_size[0] * requested_size[1]
    size, driving_size = (
        fit_area(each, area) for each in (reference_size, (video.width, video.height))
    )
    for name, (width, height) in (("src_ref", size), ("src_video", driving_size)):
        if not width or not height:
            raise InputError(
                f"{name} at size={requested_size[0]}x{requested_size[1]} would be {width}x{height}; "
                "its sides differ too much, or size is too small"
            )
    crop_size = compute_fitted_size(reference_size, size)
    return FollowedVideo(
        video, take_frames(video, fps), driving_size, size, crop_size, area, clip_frames
    )


TASKS = (
    Task(
        name="animate-2-14B",
        repository="Wan-AI/Wan2.2-Animate-2-14B",
        transformer_dims=DIMS_I2V_14B,
        inputs=Animate2Inputs(),
        published_sizes=SIZES_720P,
    ),
)
