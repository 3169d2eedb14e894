"""Source videos: what of them is used, and the inputs that do not fit together."""

import re
import shlex
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from launch import mask
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import read_packets
from wan_dist.tasks.run_config import read_config
from wan_dist.tasks.source_video import VideoFacts, iterate_frames, read_video_facts
from wan_dist.tasks.vace import fit_source_video


def run_ffmpeg(*options: str) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *options], check=True)


def make_video(path: Path, size: str = "96x64", frames: int = 9, *options: str) -> Path:
    """Write a test picture that changes with each frame."""
    source = f"testsrc=size={size}:rate=24"
    lossless = options or ("-c:v", "libx264rgb", "-crf", "0")
    run_ffmpeg("-f", "lavfi", "-i", source, "-frames:v", str(frames), *lossless, str(path))
    return path


def facts(width: int, height: int, num_frames: int, fps: float = 24.0) -> VideoFacts:
    intervals = tuple((index / fps, (index + 1) / fps) for index in range(num_frames))
    return VideoFacts("in.mp4", width, height, intervals)


def plan(*arguments: str) -> VideoPlan:
    config = read_config(["task=vace-1.3B", "prompt=x", *arguments])
    assert config is not None
    return make_plan(config, ranks=(1, 1))


@pytest.mark.parametrize(
    ("video", "area", "expected"),
    [
        ((1920, 1080, 300), 1280 * 720, (1280, 720, 81)),
        ((1920, 1080, 300), 832 * 480, (832, 480, 81)),
        ((1080, 1920, 200), 832 * 480, (464, 848, 81)),
        ((1024, 1024, 81), 832 * 480, (640, 624, 81)),
        ((640, 360, 81), 832 * 480, (640, 352, 81)),
        ((512, 512, 241), 832 * 480, (512, 512, 121)),
        ((512, 512, 1), 832 * 480, (512, 512, 1)),
    ],
)
def test_size_and_frames_are_the_references(
    video: tuple[int, int, int], area: int, expected: tuple[int, int, int]
) -> None:
    fitted = fit_source_video(facts(*video), None, area)
    assert (*fitted.size, len(fitted.frame_indices)) == expected
    assert fitted.frame_indices[0] == 0
    assert fitted.frame_indices[-1] == video[2] - 1


def test_where_frames_leave_gaps_the_nearest_is_taken() -> None:
    intervals = tuple((start, start + 0.01) for start in (0.0, 0.1, 0.2, 0.3, 0.9))
    fitted = fit_source_video(VideoFacts("in.mp4", 64, 64, intervals), None, 64 * 64)
    assert fitted.frame_indices == (0, 2, 3, 4, 4)  # times 0, 0.23, 0.45, 0.68, 0.905


def test_a_video_too_small_is_refused() -> None:
    with pytest.raises(InputError, match=r"of 200x8 is smaller than 16x16"):
        fit_source_video(facts(200, 8, 9), None, 832 * 480)


def test_the_times_of_frames_that_are_stored_out_of_order(tmp_path: Path) -> None:
    """With B-frames, and at rates that change."""
    plain = ("-c:v", "libx264", "-bf", "3", "-pix_fmt", "yuv420p", "-g", "12")
    video = make_video(tmp_path / "b.mp4", "96x64", 25, *plain)
    found = read_video_facts(str(video), "src_video")
    starts = [start for start, _ in found.intervals]
    np.testing.assert_allclose(starts, np.arange(25) / 24, atol=1e-3)
    varied = tmp_path / "varied.mkv"
    select = "select='not(between(n,5,9))'"
    run_ffmpeg("-i", str(video), "-vf", select, "-fps_mode", "vfr", str(varied))
    starts = [start for start, _ in read_packets(varied).intervals]
    kept = [index for index in range(25) if not 5 <= index <= 9]
    np.testing.assert_allclose(starts, np.array(kept) / 24, atol=2e-3)


def test_frames_are_read_by_their_index(tmp_path: Path) -> None:
    video = read_video_facts(str(make_video(tmp_path / "a.mp4")), "src_video")
    frames = list(iterate_frames(video, range(9)))
    assert len({frame.tobytes() for frame in frames}) == 9
    some = list(iterate_frames(video, (0, 3, 3, 8)))
    assert [frame.tobytes() for frame in some] == [
        frames[index].tobytes() for index in (0, 3, 3, 8)
    ]
    first = iterate_frames(video, range(9))
    assert next(first).tobytes() == frames[0].tobytes()
    first.close()  # type: ignore[attr-defined]  # not all are wanted


def test_a_rotated_video_is_upright(tmp_path: Path) -> None:
    plain = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
    video = make_video(tmp_path / "a.mp4", "96x64", 5, *plain)
    rotated = tmp_path / "rotated.mp4"
    run_ffmpeg("-display_rotation", "90", "-i", str(video), "-c", "copy", str(rotated))
    found = read_video_facts(str(rotated), "src_video")
    assert (found.width, found.height) == (64, 96)
    assert next(iterate_frames(found, [0])).shape == (96, 64, 3)


def test_what_is_used_of_a_video_is_said(tmp_path: Path) -> None:
    video, short = make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4", "96x64", 7)
    made = plan(f"src_video={video}", f"src_mask={short}", "frame_num=81")
    assert (made.width, made.height, made.frame_num) == (96, 64, 5)
    assert made.notes[0] == (
        "src_video has 9 frames (the first 7, as src_mask has no more) of 96x64 in 0.4 s, of which 5 "
        "are taken, evenly spaced, as 96x64: size is an area here, and frame_num is not used"
    )


def test_an_image_is_a_mask_for_all_frames(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    Image.new("RGB", (96, 64), "white").save(tmp_path / "mask.png")
    made = plan(f"src_video={video}", f"src_mask={tmp_path / 'mask.png'}")
    assert made.source is not None
    assert made.source.mask_indices == (0,) * 9


def test_references_take_a_latent_frame_each(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
    made = plan(f"src_ref_images={tmp_path / 'a.png'},{tmp_path / 'b.png'}", "frame_num=9")
    assert made.latent_shape[1] == 3 + 2
    assert made.num_video_latents == 3
    assert (made.width, made.height) == (832, 480)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["src_mask=IMAGE"], "src_mask is given without src_video"),
        (["src_video=nowhere.mp4"], "src_video=nowhere.mp4: there is no such file"),
        (["src_video=TEXT"], r"src_video=.* cannot be read as a video: ffmpeg says .*; mp4, mkv"),
        (["src_ref_images=TEXT"], r"src_ref_images=.* cannot be read as an image"),
        (["image=IMAGE"], "image is given, but vace-1.3B takes src_video=FILE"),
        (["max_area=1000"], "max_area=1000 needs an image or a source video"),
        (["clips=2"], "vace-1.3B takes src_video=FILE"),
        (["task=t2v-1.3B", "src_video=TEXT"], "src_video is given, but t2v-1.3B takes no image"),
        (["task=t2v-1.3B", "context_scale=0.5"], "context_scale=0.5 is for tasks with src_video"),
        (["context_scale=inf"], "context_scale=inf is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("no video")
    files = {"IMAGE": tmp_path / "a.png", "TEXT": tmp_path / "a.txt"}
    for name, file in files.items():
        arguments = [argument.replace(name, str(file)) for argument in arguments]
    with pytest.raises(InputError, match=message):
        plan(*arguments)


def make_mask(tmp_path: Path, *arguments: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames (F, H, W, 3) of both videos that the command writes."""
    mask.main([*arguments, f"output={tmp_path / 'made'}"])
    videos = [
        read_video_facts(str(tmp_path / f"made/src_{name}.mp4"), name) for name in ("video", "mask")
    ]
    video, mask_frames = (
        np.stack(list(iterate_frames(video, range(video.num_frames)))) for video in videos
    )
    return video, mask_frames


def test_masks_say_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_video(tmp_path / "a.mp4", "96x64", 5)
    original = np.stack(list(iterate_frames(read_video_facts(str(path), "video"), range(5))))
    video, mask = make_mask(tmp_path, "extend", f"video={path}", "frames=4", "before=2")
    assert (video[2:7] == original).all()
    assert (mask[2:7] == 0).all()
    for new in (slice(0, 2), slice(7, 11)):
        assert (video[new] == 128).all()
        assert (mask[new] == 255).all()
    assert "11 frames of 96x64\nsrc_video=" in capsys.readouterr().out

    video, mask = make_mask(tmp_path, "inpaint", f"video={path}", "box=10,20,30x8")
    assert (mask[:, 20:28, 10:40] == 255).all()
    assert (video[:, 20:28, 10:40] == 128).all()
    assert mask.sum(dtype=np.int64) == 5 * 8 * 30 * 3 * 255
    assert (video[mask == 0] == original[mask == 0]).all()

    video, mask = make_mask(tmp_path, "outpaint", f"video={path}", "size=128x96", "at=0,32")
    assert (video[:, 32:, :96] == original).all()
    assert (mask[:, 32:, :96] == 0).all()
    assert (mask == 255).sum() == 5 * 3 * (128 * 96 - 96 * 64)

    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    video, mask = make_mask(tmp_path, "frames", f"last={tmp_path / 'a.png'}", "frames=5")
    assert (video[-1] == (255, 0, 0)).all()
    assert (video[:-1] == 128).all()
    assert mask[:, 0, 0, 0].tolist() == [255, 255, 255, 255, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mask takes one of extend, inpaint, outpaint, frames"),
        (["extend"], "video=FILE is missing"),
        (["extend", "video=VIDEO"], "how many frames are to be added"),
        (["extend", "video=VIDEO", "frames=0"], "frames=0 is not a number of frames"),
        (["inpaint", "video=VIDEO", "box=1,2"], "box=1,2 is not X,Y,WIDTHxHEIGHT"),
        (["inpaint", "video=VIDEO", "box=90,0,10x10"], "is not inside the video of 96x64"),
        (["outpaint", "video=VIDEO", "size=64x64"], "is smaller than the video of 96x64"),
        (["outpaint", "video=VIDEO", "size=128x64", "at=40,0"], "at=40,0: the video would reach"),
        (["frames"], "no image is given"),
        (["extend", "speed=2"], "speed=2 is none of them"),
        (["extend", "video=VIDEO", "frames=4", "box=0,0,8x8"], "box=0,0,8x8 is none of them"),
        (
            ["extend", "video=VIDEO", "frames=4", "output=VIDEO"],
            "output=.* cannot be made: File exists",
        ),
    ],
)
def test_what_no_mask_can_be_made_of(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=message):
        mask.main([argument.replace("VIDEO", str(path)) for argument in arguments])


def test_the_commands_of_the_page_write_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs/vace.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    wan-dist mask (.*)", page, re.MULTILINE)
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    for name in ("clip.mp4", "outputs/a.mp4"):
        make_video(tmp_path / name, "640x360", 2, "-c:v", "libx264")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / name)
    for command in commands:
        mask.main(shlex.split(command))
    printed = capsys.readouterr().out
    assert printed.count("src_video=") == len(commands)
    assert "82 frames of 640x360" in printed
