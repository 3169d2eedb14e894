"""Clips, times and sizes of speech to video."""

from pathlib import Path

import pytest

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import AudioTrack
from wan_dist.tasks.sound import Sound
from wan_dist.tasks.source_video import VideoFacts
from wan_dist.tasks.speech import Speech, describe_bars, fit_padded_size, plan_speech

SIZES = {
    (832, 480): [(832, 448), (832, 512), (832, 512)],
    (1280, 720): [(832, 448), (1088, 640), (1280, 704)],
    (1920, 1080): [(832, 448), (1088, 640), (1280, 704)],
    (1024, 1024): [(576, 576), (832, 832), (960, 960)],
    (1000, 750): [(704, 512), (960, 704), (1024, 768)],
    (640, 480): [(640, 512), (640, 512), (640, 512)],
    (512, 512): [(512, 512)] * 3,
}
"""Of the reference, for the areas of 480*832, 1024*704 and 720*1280."""


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_references(size: tuple[int, int]) -> None:
    areas = (480 * 832, 1024 * 704, 720 * 1280)
    assert [fit_padded_size(*size, area) for area in areas] == SIZES[size]
    turned = [fit_padded_size(*size[::-1], area)[::-1] for area in areas]
    assert turned == SIZES[size]


def test_a_size_that_no_scale_gives() -> None:
    with pytest.raises(
        InputError, match="an area of 5000 pixels is too small for a picture of 10x2000"
    ):
        fit_padded_size(10, 2000, 5000)
    assert fit_padded_size(4000, 3000, 64 * 64) == (64, 64)


def test_bars_are_told() -> None:
    told = describe_bars((1280, 720), (1280, 704))
    assert told is not None
    assert "black columns of 14 and 15 at its sides" in told
    assert describe_bars((1280, 704), (1280, 704)) is None


def make_sound(seconds: float, rate: int = 48000) -> Sound:
    return Sound("talk.wav", AudioTrack(rate, 2, round(seconds * rate)))


def make_pose(num_frames: int, rate: float) -> VideoFacts:
    intervals = tuple((index / rate, (index + 1) / rate) for index in range(num_frames))
    return VideoFacts("pose.mp4", 640, 480, intervals)


def make_speech(seconds: float = 10.0, pose: VideoFacts | None = None, **changes: object) -> Speech:
    settings = {
        "clip_frames": 80,
        "num_clips": None,
        "starts_from_picture": False,
        "sync": "exact",
    } | changes
    return plan_speech(make_sound(seconds), pose, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "settings", "clips", "frames", "shown"),
    [
        (5.0, {}, 1, 77, 77),
        (5.005, {}, 2, 157, 78),
        (4.0, {}, 1, 77, 61),
        (4.0, {"sync": "reference"}, 1, 77, 64),
        (4.0, {"starts_from_picture": True}, 1, 80, 64),
        (12.0, {"num_clips": 2}, 2, 157, 157),
        (12.0, {"num_clips": 9}, 3, 237, 189),
        (12.0, {"clip_frames": 48}, 4, 189, 189),
        (600.0, {}, 120, 9597, 9597),
    ],
)
def test_clips_and_frames(
    seconds: float, settings: dict[str, object], clips: int, frames: int, shown: int
) -> None:
    speech = make_speech(seconds, **settings)
    assert (speech.num_clips, speech.num_frames, speech.num_shown_frames) == (clips, frames, shown)


@pytest.mark.parametrize("clip_frames", [4, 48, 80])
@pytest.mark.parametrize("starts_from_picture", [False, True])
def test_each_frame_is_written_once(clip_frames: int, starts_from_picture: bool) -> None:
    """What a clip decodes to begins with frames that the video has, or that are no part of it."""
    speech = make_speech(20, clip_frames=clip_frames, starts_from_picture=starts_from_picture)
    num_written = 0
    for clip_index in range(speech.num_clips):
        num_latents = speech.count_context_latents(clip_index) + clip_frames // 4
        num_decoded = 4 * (num_latents - 1) + 1
        num_known = num_written - speech.find_first_frame(clip_index)
        assert num_decoded - num_known == speech.count_new_frames(clip_index)
        num_written += speech.count_new_frames(clip_index)
    assert num_written == speech.num_frames


@pytest.mark.parametrize("rate", [8, 12.5, 16, 23.976, 24, 25, 30, 50, 60])
def test_poses_are_taken_by_time(rate: float) -> None:
    """Of each frame's middle, so that the error is at most half of a frame of the pose video."""
    speech = make_speech(10, make_pose(int(rate * 30), rate))
    for clip_index in range(speech.num_clips):
        for position, index in enumerate(speech.list_pose_frames(clip_index)):
            assert index is not None
            time = (clip_index * 80 + position + 0.5) / 16
            assert abs((index + 0.5) / rate - time) <= 0.5 / rate + 1e-9


@pytest.mark.parametrize(
    ("rate", "interval"), [(8, 1), (16, 1), (24, 2), (25, 2), (30, 2), (40, 2), (60, 4)]
)
def test_poses_of_the_reference_are_every_nth(rate: float, interval: int) -> None:
    speech = make_speech(6, make_pose(int(rate * 30), rate), sync="reference")
    assert speech.list_pose_frames(1) == [interval * frame for frame in range(80, 160)]


def test_poses_end_with_their_video() -> None:
    speech = make_speech(6, make_pose(72, 24))  # 3 s
    first = speech.list_pose_frames(0)
    assert first[47] is not None
    assert first[48:] == [None] * 32
    assert speech.list_pose_frames(1) == [None] * 80
    assert "are black after its end" in " ".join(speech.notes)


def test_a_sound_has_as_many_samples_as_librosa_gives() -> None:
    assert Sound("a", AudioTrack(44100, 2, 221184)).num_speech_samples == 80249
    assert Sound(str(Path("~/a")), AudioTrack(16000, 1, 5)).path == Path.home() / "a"
