"""Each format of a video: what ffmpeg says of the file, and that the text in it survives."""

import json
import random
import re
import subprocess
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from wan_dist.config.output_section import OutputConfig
from wan_dist.config.video_formats import RESULT_SUFFIXES, VIDEO_FORMATS, remove_result_suffix
from wan_dist.output.gallery.sheet import get_sheet_path, write_sheet
from wan_dist.output.output_check import OutputEstimate, check_output_folder
from wan_dist.output.video_encoding import VideoEncoding
from wan_dist.output.video_file import SaveError, convert_to_10_bits, convert_to_uint8, save_video
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import read_comment, read_packets

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SAID = {
    "h264": ("a.mp4", r"Video: h264 \(High\) \(avc1 .*yuv420p\(tv, bt709, progressive\)"),
    "h265": ("a.mp4", r"Video: hevc \(Main 10\) \(hvc1 .*yuv420p10le\(tv, bt709, progressive\)"),
    "av1": ("a.mp4", r"Video: av1 .*\(Main\) \(av01 .*yuv420p10le\(tv, bt709, progressive\)"),
    "vp9": ("a.webm", r"Video: vp9 \(Profile 0\), yuv420p\(tv, bt709, progressive\)"),
    "prores": ("a.mov", r"Video: prores \(HQ\) \(apch .*yuv422p10le\(tv, bt709, progressive\)"),
    "ffv1": ("a.mkv", r"Video: ffv1, gbrp10le\(pc, gbr/bt709/bt709, progressive\)"),
    "png": ("a.mov", r"Video: png .*rgb24\(pc, gbr/bt709/bt709, progressive\)"),
}
"""File, and ffmpeg's words for its video: one bt709 stands for matrix, primaries and transfer."""
SOUND_SAID = {
    "h264": "Audio: aac (LC)",
    "vp9": "Audio: opus",
    "prores": "Audio: pcm_s16le",
    "ffv1": "Audio: pcm_s16le",
}
NUM_FRAMES, HEIGHT, WIDTH = 9, 48, 80


def make_float_frames() -> torch.Tensor:
    """Return a gradient (F, H, W, 3) in [-1, 1] that moves, with steps finer than 8 bits."""
    t, y, x = torch.meshgrid(
        *(torch.linspace(0, 1, length) for length in (NUM_FRAMES, HEIGHT, WIDTH)), indexing="ij"
    )
    return torch.stack([0.2 * x + 0.1 * t, 0.2 * y, 0.1 * (x + y)], dim=-1) - 0.1


def write(folder: Path, name: str, comment: str | None = None, **encoding: object) -> Path:
    path = folder / SAID[name][0]
    convert = convert_to_10_bits if VIDEO_FORMATS[name].bits > 8 else convert_to_uint8
    frames = convert(make_float_frames())
    save_video(
        path,
        frames.split([1, 4, 4]),
        fps=12,
        num_frames=NUM_FRAMES,
        encoding=VideoEncoding(name, **encoding),  # type: ignore[arg-type]
        comment=comment,
    )
    return path


def ask(path: Path) -> str:
    return subprocess.run([FFMPEG, "-i", path], capture_output=True, check=False, text=True).stderr


def decode(path: Path, bits: int) -> torch.Tensor:
    """Return a video's frames in [-1, 1]."""
    pixel_format, dtype, largest = ("rgb24", "u1", 255) if bits == 8 else ("rgb48le", "<u2", 65535)
    command = [FFMPEG, "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", pixel_format, "-"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    numbers = np.frombuffer(content, dtype).reshape(-1, HEIGHT, WIDTH, 3).astype(np.float32)
    return torch.from_numpy(numbers) * 2 / largest - 1


def make_sound(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(48000)
        sound.writeframes(np.zeros(int(48000 * seconds), "<i2").tobytes())
    return path


@pytest.mark.parametrize("name", VIDEO_FORMATS)
def test_a_file_is_what_its_format_says(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    facts = ask(path)
    assert re.search(SAID[name][1], facts), facts
    for fact in (f"{WIDTH}x{HEIGHT}", "12 fps"):
        assert fact in facts
    assert len(read_packets(path).intervals) == NUM_FRAMES
    frames, expected = decode(path, VIDEO_FORMATS[name].bits), make_float_frames()
    assert frames.shape == expected.shape
    error = (frames - expected).abs()
    assert error.mean() < 0.01
    if name == "ffv1":
        assert error.max() <= 1 / 1023 + 1e-4  # half a step of 10 bits
    if name == "png":
        assert error.max() <= 1 / 255 + 1e-4
    write_sheet(path, get_sheet_path(path), num_frames=NUM_FRAMES)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a.jpg", path.name]


def test_ten_bits_hold_steps_that_eight_do_not(tmp_path: Path) -> None:
    """A slow gradient has bands in 8 bits."""
    levels = {
        name: len(decode(write(tmp_path, name), VIDEO_FORMATS[name].bits)[0, 0, :, 0].unique())
        for name in ("png", "prores", "ffv1")
    }
    assert levels["png"] <= 27
    assert min(levels["prores"], levels["ffv1"]) > 1.5 * levels["png"]


def test_10_bits_are_rounded_to_nearest() -> None:
    values = torch.tensor([-1.0, -0.9991, -0.9989, 0.0, 1 / 1023, 1.0, 1.5, -7.0, 0.25])
    pixels = values.view(1, 1, 9, 1).expand(2, 1, 9, 3)
    numbers = np.frombuffer(convert_to_10_bits(pixels).numpy().tobytes(), "<u2").reshape(2, 9, 3)
    assert (numbers[0, :, 0] >> 6).tolist() == [0, 0, 1, 512, 512, 1023, 1023, 0, 639]
    assert numbers.max() == 65535
    assert (numbers == numbers[:1, :, :1]).all()


@pytest.mark.parametrize("name", VIDEO_FORMATS)
def test_150_kilobytes_of_settings_survive(name: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    noise = "".join(chance.choice("ab;=#\\\n猫é '\"\t%") for _ in range(110_000))
    comment = json.dumps({"settings": {"prompt": noise}}, ensure_ascii=False) + "\n;[x]\nb=c"
    assert len(comment.encode()) > 150_000
    path = write(tmp_path, name, comment)
    assert read_comment(path) == comment
    for suffix, options in {
        ".mkv": ["-c", "copy"],
        ".mp4": ["-c:v", "libx264"],
        ".mov": ["-c:v", "libx264", "-movflags", "use_metadata_tags"],
    }.items():
        other = tmp_path / f"other{suffix}"
        command = [FFMPEG, "-v", "error", "-y", "-i", path, *options, other]
        subprocess.run(command, check=True)
        assert read_comment(other) == comment, suffix


def test_a_file_without_settings_has_no_comment(tmp_path: Path) -> None:
    assert read_comment(write(tmp_path, "h264")) is None


@pytest.mark.parametrize("name", SOUND_SAID)
@pytest.mark.parametrize("seconds", [0.3, 5.0])
def test_sound_is_laid_under_the_video(name: str, seconds: float, tmp_path: Path) -> None:
    """Longer than the video it is cut off; shorter, it ends, and the video does not."""
    sound = make_sound(tmp_path / "sound.wav", seconds)
    path = write(tmp_path, name, "the settings", audio=sound)
    facts = ask(path)
    assert re.search(SAID[name][1], facts)
    assert SOUND_SAID[name] in facts
    assert len(read_packets(path).intervals) == NUM_FRAMES
    assert read_comment(path) == "the settings"
    length = re.search(r"Duration: 00:00:0([\d.]+)", facts)
    assert length is not None
    assert float(length[1]) == pytest.approx(NUM_FRAMES / 12, abs=0.1)


def test_sound_that_a_container_takes_is_copied(tmp_path: Path) -> None:
    sound = make_sound(tmp_path / "sound.wav", 1.0)
    taken = tmp_path / "sound.m4a"
    # its own comment is not the video's
    command = [FFMPEG, "-v", "error", "-i", sound, "-metadata", "comment=a song", taken]
    subprocess.run(command, check=True)

    def packets(path: Path) -> list[str]:
        command = [FFMPEG, "-v", "error", "-i", path, "-map", "0:a", "-c", "copy"]
        listing = subprocess.run([*command, "-f", "framecrc", "-"], capture_output=True, check=True)
        lines = listing.stdout.decode().splitlines()
        return [line.split(",")[-1] for line in lines if line.startswith("0,")][1:20]

    path = write(tmp_path, "h264", audio=taken)
    assert packets(path) == packets(taken)
    assert read_comment(path) is None


def test_a_rate_factor_counts(tmp_path: Path) -> None:
    sizes = [write(tmp_path, "h264", crf=crf).stat().st_size for crf in (1, 30)]
    assert sizes[0] > 1.5 * sizes[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"video": "h266"}, r"output.video=h266 is not one of h264, h265, av1, vp9, prores"),
        (
            {"video": "ffv1", "crf": 3},
            "output.crf=3: ffv1 has no rate factor; h264, h265, av1, vp9",
        ),
        ({"video": "h264", "crf": 0}, "output.crf=0 must be 1 to 51 for h264; the default is 10"),
        ({"video": "vp9", "crf": 64}, "output.crf=64 must be 0 to 63 for vp9"),
    ],
)
def test_what_no_format_has_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        OutputConfig(**settings)  # type: ignore[arg-type]


def test_an_encoder_that_ffmpeg_lacks_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\necho ' V....D libx264              libx264 H.264 (codec h264)'\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    estimates = [OutputEstimate("a", 64, 64, 16, encoding=VideoEncoding(name)) for name in SAID]
    with pytest.raises(
        InputError,
        match=r"output.video=h265 needs the encoder libx265, which .*/ffmpeg lacks; it can write h264\.",
    ):
        check_output_folder(tmp_path / "out", estimates[1:])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [None, b"no sound", b""])
def test_sound_that_cannot_be_read_is_told_first(content: bytes | None, tmp_path: Path) -> None:
    sound = tmp_path / "sound.wav"
    if content is not None:
        sound.write_bytes(content)
    with pytest.raises(InputError, match=r"output.audio=.*/sound.wav cannot be read as sound: "):
        check_output_folder(
            tmp_path / "out",
            [OutputEstimate("a", 64, 64, 16, encoding=VideoEncoding(audio=sound))],
        )


def test_each_encoding_of_a_run_is_tried(tmp_path: Path) -> None:
    estimates = [OutputEstimate(name, 64, 64, 16, encoding=VideoEncoding(name)) for name in SAID]
    check_output_folder(tmp_path, estimates)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", VIDEO_FORMATS)
def test_a_short_video_is_refused_in_each_format(name: str, tmp_path: Path) -> None:
    frames = torch.zeros(5, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    path = tmp_path / SAID[name][0]
    with pytest.raises(SaveError, match="it has 5 frames, not 9"):
        save_video(path, [frames], fps=12, num_frames=9, encoding=VideoEncoding(name))
    assert not list(tmp_path.iterdir())


def test_suffixes_are_no_part_of_a_name() -> None:
    assert set(RESULT_SUFFIXES) == {".mp4", ".png", ".webm", ".mov", ".mkv"}
    assert {remove_result_suffix(f"clip{suffix}") for suffix in RESULT_SUFFIXES} == {"clip"}
    assert remove_result_suffix("clip.2.wav") == "clip.2.wav"
