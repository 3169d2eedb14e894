"""A driving video as Animate-2 takes it, against the goldens: frames, sizes, clips and pixels."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.conftest import golden_folder
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.animate_2 import FollowedVideo, follow_video
from wan_dist.tasks.letterbox import fit_on_black, resize_by_area
from wan_dist.tasks.source_video import VideoFacts, iterate_frames, read_video_facts

GOLDEN = "wan2.2-animate-2"
CASES = ["distilled", "release", "distilled_padded"]


def read_facts(case: str) -> dict[str, Any]:
    file = golden_folder(GOLDEN) / f"expected/{case}.json"
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def follow(facts: dict[str, Any]) -> tuple[FollowedVideo, np.ndarray]:
    """Return the golden's driving video, and the image of its character."""
    inputs = golden_folder(GOLDEN) / "driving"
    video = read_video_facts(str(inputs / f"{facts['driving']}.mp4"), "src_video")
    image = Image.open(inputs / f"{facts['driving']}.png").convert("RGB")
    followed = follow_video(
        video,
        image.size,
        requested_size=tuple(facts["size_wh"]),
        clip_frames=facts["clip_len"],
        fps=facts["fps"],
    )
    return followed, np.asarray(image)


@pytest.mark.parametrize("case", CASES)
def test_frames_and_clips_are_the_releases(case: str) -> None:
    facts = read_facts(case)
    followed, _ = follow(facts)
    assert list(followed.frame_indices) == facts["driving_index"]
    assert followed.num_frames == facts["result_frames"]
    assert followed.num_lengthened == facts["padded_frames"]
    assert followed.num_clips == facts["clips"]
    walk = [facts["driving_index"][index] for index in facts["padded_index"]]
    for index, (start, length) in enumerate(followed.clips):
        assert list(followed.list_frames(index)) == walk[start : start + length]


@pytest.mark.parametrize("case", CASES)
def test_sizes_and_pixels_are_the_releases(case: str) -> None:
    facts = read_facts(case)
    followed, image = follow(facts)
    assert followed.size == tuple(facts["frame_hw"][::-1])
    assert followed.driving_size == tuple(facts["driving_hw"][::-1])
    side, offset, length = facts["letterbox"]
    index = ("width", "height").index(side)
    assert followed.crop_size[index] == length
    assert (followed.size[index] - length) // 2 == offset
    file = golden_folder(GOLDEN) / f"expected/{case}.safetensors"
    with safe_open(file, "numpy") as golden:
        keys = set(golden.keys())
        if "input.reference" in keys:
            fitted = fit_on_black(image, followed.size, shrinks_by_area=True)
            assert np.array_equal(fitted, golden.get_tensor("input.reference"))
        if "input.driving_every4" in keys:
            frames = iterate_frames(followed.video, followed.frame_indices[::4])
            fitted = np.stack(
                [
                    fit_on_black(frame, followed.driving_size, shrinks_by_area=True)
                    for frame in frames
                ]
            )
            assert np.array_equal(fitted, golden.get_tensor("input.driving_every4"))


@pytest.mark.parametrize(
    ("num_frames", "clip_frames", "clips"),
    [
        (81, 81, [(0, 81)]),  # lengthened to 109, of which the second clip would be cut off
        (82, 81, [(0, 81), (80, 29)]),
        (109, 81, [(0, 81), (80, 33)]),
        (2, 81, [(0, 29)]),
        (100, 33, [(0, 33), (32, 33), (64, 33), (96, 29)]),
    ],
)
def test_clips(num_frames: int, clip_frames: int, clips: list[tuple[int, int]]) -> None:
    video = VideoFacts("x", 64, 64, tuple((i / 24, (i + 1) / 24) for i in range(num_frames)))
    followed = follow_video(
        video, (64, 64), requested_size=(64, 64), clip_frames=clip_frames, fps=24
    )
    assert list(followed.clips) == clips
    assert all(length % 4 == 1 for _, length in clips)


def test_a_driving_video_of_one_frame_is_refused() -> None:
    video = VideoFacts("x", 64, 64, ((0.0, 1 / 24),))
    with pytest.raises(
        InputError, match="has 1 frames at 24 fps, of which fps=24 takes 1; a driving"
    ):
        follow_video(video, (64, 64), requested_size=(64, 64), clip_frames=81, fps=24)


def test_an_area_is_the_mean_of_whole_pixels() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    expected = image.reshape(2, 2, 3, 2, 3).mean((1, 3))
    assert np.abs(resize_by_area(image, (3, 2)) - expected).max() <= 0.5
