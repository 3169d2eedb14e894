"""Speech to video: a picture speaks or sings as in a sound file, and moves as in a pose video if given.

The video is made clip by clip; each clip is shown the frames before it, its own part of the sound, and the
picture.

Source: `WanS2V` of the reference (Wan-Video/Wan2.2).
"""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt

from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task, TaskInputs
from wan_dist.tasks.published_dims import DIMS_S2V_14B, DIMS_WAV2VEC_XLSR, SIZES_S2V
from wan_dist.tasks.sound import SPEECH_RATE, Sound
from wan_dist.tasks.source_video import VideoFacts

FRAME_RATE = 16
"""Frames in a second that the model makes."""
CLIP_FRAMES = 80
"""Frames of a clip, unless others are requested."""
CLIP_MULTIPLE = 4
"""Frames of a latent frame."""
NUM_HISTORY_FRAMES = 73
"""Frames before a clip that the model is shown."""
NUM_HISTORY_LATENTS = (NUM_HISTORY_FRAMES - 1) // CLIP_MULTIPLE + 1
NUM_REFERENCE_FRAMES = 6
"""Frames of the history before the first clip that are the picture, where the video starts from it."""
_NUM_DROPPED_FRAMES = 3
"""First frames of the video that are left out, unless it starts from the picture."""
_SIDE_MULTIPLE = 64
_NUM_SCALES = 100
"""Scales of a picture that are tried from the largest down."""
_MIN_SCALE = 0.1
_MIN_SOUND_SECONDS = 0.05
"""Two steps of the audio encoder, of which a vector can be made."""
_STEP_RATE = 50
"""Steps in a second of the audio encoder."""
_VECTOR_RATE = 30
"""Vectors in a second that its steps are interpolated to."""
_VECTORS_PER_FRAME = _VECTOR_RATE / FRAME_RATE


@dataclass(frozen=True)
class SpeechInputs(TaskInputs):
    """A picture, a sound file, and perhaps a video of poses."""

    kind: str = "speech"
    file_keys: tuple[str, ...] = ("image", "audio", "pose_video")
    usage: str = "image=FILE audio=FILE, and perhaps pose_video=FILE"
    is_required: bool = True
    is_always_encoded: bool = True

    def choose_keys(self, given_keys: Collection[str]) -> tuple[str, ...]:
        """Return the settings that belong together, by those that are given."""
        return self.file_keys if "pose_video" in given_keys else self.file_keys[:2]

    def fit_size(
        self, image_size: tuple[int, int], area: int, size_multiple: tuple[int, int]
    ) -> tuple[int, int]:
        """See `TaskInputs.fit_size`; as `fit_padded_size`."""
        return fit_padded_size(*image_size, area)


@dataclass(frozen=True, kw_only=True)
class Speech:
    """Sound and poses of a video, the clips that are made of them, and when they are shown."""

    sound: Sound | None
    """None in a plan without files."""
    pose: VideoFacts | None
    clip_frames: int
    num_clips: int
    starts_from_picture: bool
    is_exact: bool
    """Whether sound and poses are shown at their times, and not as in the reference."""

    @property
    def num_dropped_frames(self) -> int:
        """Frames that are made before the video's first one."""
        return 0 if self.starts_from_picture else _NUM_DROPPED_FRAMES

    @property
    def num_frames(self) -> int:
        """Frames of the video, also those after the sound's end."""
        return self.num_made_frames - self.num_dropped_frames

    @property
    def num_made_frames(self) -> int:
        """Frames of all clips."""
        return self.num_clips * self.clip_frames

    @property
    def sound_start_seconds(self) -> float:
        """What of the sound is left out before the first frame, to which it belongs otherwise."""
        return self.num_dropped_frames / FRAME_RATE if self.is_exact else 0.0

    @property
    def num_shown_frames(self) -> int:
        """Frames of the video file, which ends with the sound."""
        if self.sound is None:
            return self.num_frames
        track = self.sound.track
        num_heard = -(-track.num_samples * FRAME_RATE // track.rate)
        num_heard -= self.num_dropped_frames if self.is_exact else 0
        return max(1, min(self.num_frames, num_heard))

    @property
    def num_repeated(self) -> int:
        """Frames that a clip after the first is shown of those before it."""
        return NUM_HISTORY_FRAMES

    def count_context_latents(self, clip_index: int) -> int:
        """Return the latent frames that are decoded before those of a clip: history, or the picture's."""
        return NUM_HISTORY_LATENTS if clip_index or self.starts_from_picture else 1

    def count_new_frames(self, clip_index: int) -> int:
        """Return the frames of the video that a clip adds."""
        return self.clip_frames - (0 if clip_index else self.num_dropped_frames)

    @property
    def max_context_latents(self) -> int:
        """`count_context_latents` of the last clip, which has most."""
        return self.count_context_latents(self.num_clips - 1)

    @property
    def num_samples(self) -> int:
        """Samples that the audio encoder takes; without a file those of the clips."""
        if self.sound is None:
            return self.num_clips * self.clip_frames * SPEECH_RATE // FRAME_RATE
        return self.sound.num_speech_samples

    def find_first_frame(self, clip_index: int) -> int:
        """Return the index in the video of the first frame that a clip's latents decode to.

        Below 0 for frames that are no part of it.
        """
        num_context_frames = CLIP_MULTIPLE * (self.count_context_latents(clip_index) - 1) + 1
        return clip_index * self.clip_frames - self.num_dropped_frames - num_context_frames

    def list_pose_frames(self, clip_index: int) -> list[int | None]:
        """Return the frame of the pose video at each of a clip's frames, None after its end.

        By time: what is shown in the middle of a frame. In the reference every n-th, whatever the rate.
        """
        assert self.pose is not None
        first = clip_index * self.clip_frames
        frames = range(first, first + self.clip_frames)
        if self.is_exact:
            starts = [start for start, _ in self.pose.intervals]
            times = [(frame + 0.5) / FRAME_RATE for frame in frames]
            return [
                bisect_right(starts, time) - 1 if time < self.pose.seconds else None
                for time in times
            ]
        rate = self.pose.num_frames / self.pose.seconds
        interval = max(1, round(rate / FRAME_RATE))
        return [
            frame * interval if frame * interval < self.pose.num_frames else None
            for frame in frames
        ]

    @property
    def notes(self) -> list[str]:
        """What is done with sound and poses, a line each."""
        notes = []
        if self.sound is not None:
            shown_seconds = self.num_shown_frames / FRAME_RATE
            num_possible = count_sound_clips(self.sound, self.clip_frames)
            notes.append(
                f"audio has {self.sound.seconds:.2f} s, which take {num_possible} clips of "
                f"{self.clip_frames} frames, and {self.num_clips} are made: the file has "
                f"{shown_seconds:.2f} s, to the end of the sound or of the last clip"
            )
        if not self.is_exact and self.num_dropped_frames:
            lead = 1000 * self.num_dropped_frames / FRAME_RATE
            notes.append(
                f"sync=reference: the picture runs {lead:.1f} ms ahead of the sound, as in the reference"
            )
        if self.pose is not None:
            used = self.list_pose_frames(self.num_clips - 1)
            missing = "" if used[-1] is not None else ", and are black after its end"
            notes.append(
                f"pose_video has {self.pose.seconds:.2f} s in {self.pose.num_frames} frames, of which poses "
                f"for {self.num_made_frames / FRAME_RATE:.2f} s are taken at {FRAME_RATE} fps{missing}"
            )
        return notes


def count_audio_vectors(num_samples: int) -> int:
    """Return how many vectors the audio encoder's steps over samples at 16 kHz are interpolated to."""
    return int(DIMS_WAV2VEC_XLSR.count_steps(num_samples) / _STEP_RATE * _VECTOR_RATE)


def count_clips(num_vectors: int, clip_frames: int) -> int:
    """Return the clips of ``clip_frames`` that the sound takes; the last one may be without any of it."""
    return int(num_vectors / (clip_frames * _VECTORS_PER_FRAME)) + 1


def count_sound_clips(sound: Sound, clip_frames: int) -> int:
    """Return `count_clips` of a sound."""
    return count_clips(count_audio_vectors(sound.num_speech_samples), clip_frames)


def list_audio_columns(num_frames: int) -> list[int]:
    """Return which of the vectors each frame hears; halves are rounded to the even one."""
    return [round(frame * _VECTORS_PER_FRAME) for frame in range(num_frames)]


def plan_speech(
    sound: Sound | None,
    pose: VideoFacts | None,
    *,
    clip_frames: int,
    num_clips: int | None,
    starts_from_picture: bool,
    sync: str,
) -> Speech:
    """Return the clips of a sound, ``num_clips`` at most; raises InputError for what cannot be made."""
    if clip_frames < CLIP_MULTIPLE or clip_frames % CLIP_MULTIPLE:
        below = max(clip_frames // CLIP_MULTIPLE, 1) * CLIP_MULTIPLE
        raise InputError(
            f"infer_frames={clip_frames} is not a multiple of {CLIP_MULTIPLE}; the nearest that work are "
            f"{below} and {below + CLIP_MULTIPLE}"
        )
    if num_clips is not None and num_clips < 1:
        raise InputError(f"num_clip={num_clips} must be at least 1, or null for all of the sound")
    num_possible = num_clips or 1
    if sound is not None:
        num_possible = count_sound_clips(sound, clip_frames)
    speech = Speech(
        sound=sound,
        pose=pose,
        clip_frames=clip_frames,
        num_clips=min(num_clips or num_possible, num_possible),
        starts_from_picture=starts_from_picture,
        is_exact=sync == "exact",
    )
    if sound is not None:
        needed_seconds = max(_MIN_SOUND_SECONDS, speech.sound_start_seconds)
        if sound.seconds <= needed_seconds:
            raise InputError(
                f"audio={sound.file} has {sound.seconds:.3f} s of sound; more than {needed_seconds} s are "
                "needed"
            )
    return speech


def fit_padded_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) of at most ``area`` pixels that a picture is shown in, multiples of 64.

    The largest of 100 scales at which the picture's sides, rounded up to multiples, fit; a picture is
    enlarged to the next multiples at most. Raises InputError if a side would be 0.
    """
    pixels = width * height
    if area < _SIDE_MULTIPLE**2:
        raise _make_area_error(width, height, area)
    max_scale, min_scale = 1.0, _MIN_SCALE
    if pixels > area:
        max_scale = sqrt(area / pixels)
        # Of the reference, whose quadratic equation has 2 where it should have 4.
        b = (_SIDE_MULTIPLE - 1) * (width + height)
        root = sqrt(b * b - 2 * pixels * ((_SIDE_MULTIPLE - 1) ** 2 - area))
        min_scale = (root - b) / (2 * pixels)
    for index in range(_NUM_SCALES):
        scale = max_scale - (max_scale - min_scale) * index / _NUM_SCALES
        sides = [
            -(-int(side * scale) // _SIDE_MULTIPLE) * _SIDE_MULTIPLE for side in (width, height)
        ]
        if all(sides) and sides[0] * sides[1] <= area:
            return sides[0], sides[1]
    sides = [_round_down(sqrt(area * width / height)), _round_down(sqrt(area * height / width))]
    if sides[0] >= width or sides[1] >= height:
        sides = [_round_down(width), _round_down(height)]
    if not all(sides):
        raise _make_area_error(width, height, area)
    return sides[0], sides[1]


def _round_down(side: float) -> int:
    return int(side // _SIDE_MULTIPLE) * _SIDE_MULTIPLE


def _make_area_error(width: int, height: int, area: int) -> InputError:
    return InputError(
        f"an area of {area} pixels is too small for a picture of {width}x{height}: both sides must be "
        f"multiples of {_SIDE_MULTIPLE}; give a larger max_area or size, or another picture"
    )


def fit_picture(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) that a picture is scaled to before it is cut to ``size``.

    Its shorter side gets the shorter one's length, as in the reference; black bars fill what is missing.
    """
    shorter, longer = min(image_size), max(image_size)
    target = min(size)
    scaled = int(target * longer / shorter)
    return (target, scaled) if image_size[0] <= image_size[1] else (scaled, target)


def describe_bars(image_size: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Return what of the video's frames the picture does not fill, None where it fills them."""
    missing = [
        (name, side - fitted)
        for name, side, fitted in zip(
            ("columns", "rows"), size, fit_picture(image_size, size), strict=True
        )
        if fitted < side
    ]
    if not missing:
        return None
    bars = " and ".join(
        f"black {name} of {number // 2} and {number - number // 2}" for name, number in missing
    )
    return (
        f"the picture of {image_size[0]}x{image_size[1]} is shown with {bars} at its sides, as in the "
        f"reference; one of {size[0]}x{size[1]} fills the frames"
    )


TASKS = (
    Task(
        name="s2v-14B",
        repository="Wan-AI/Wan2.2-S2V-14B",
        transformer_dims=DIMS_S2V_14B,
        audio_encoder_dims=DIMS_WAV2VEC_XLSR,
        inputs=SpeechInputs(),
        published_sizes=SIZES_S2V,
    ),
)
