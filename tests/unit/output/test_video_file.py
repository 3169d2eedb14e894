import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from wan_dist.output.gallery.sheet import write_sheet
from wan_dist.output.output_check import OutputEstimate, check_output_folder
from wan_dist.output.video_file import SaveError, save_image, save_tensors, save_video
from wan_dist.pipeline.decode import convert_to_uint8_frames
from wan_dist.runtime.errors import InputError


def read_video(path: Path, *, width: int, height: int) -> tuple[str, torch.Tensor]:
    """Return what ffmpeg says of the file, and its frames (F, H, W, 3)."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-i",
        path,
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    return done.stderr.decode(), torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).view(
        -1, height, width, 3
    )


def smooth_frames(num_frames: int = 9, height: int = 48, width: int = 80) -> torch.Tensor:
    t, y, x = torch.meshgrid(
        torch.arange(num_frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    return torch.stack([x * 3, y * 5, t * 20 + x], dim=-1).clamp(0, 255).byte()


def test_a_video_is_what_went_in(tmp_path: Path) -> None:
    frames = smooth_frames()
    save_video(tmp_path / "a.mp4", iter(frames.split([1, 4, 4])), fps=12, num_frames=9)
    facts, decoded = read_video(tmp_path / "a.mp4", width=80, height=48)
    for fact in ("Video: h264", "yuv420p(tv, bt709", "80x48", "12 fps"):
        assert fact in facts
    assert decoded.shape == frames.shape
    assert (
        decoded.float() - frames.float()
    ).abs().mean() < 2.5  # chroma is halved, the rest is nearly lossless
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_are_rounded_to_nearest() -> None:
    frames = (
        torch.tensor([-1.0, -0.9999, 0.0, 1 / 255, 0.999, 1.0, 1.5, -7.0])
        .view(1, 1, 1, 8)
        .expand(3, 2, 4, 8)
    )
    out = convert_to_uint8_frames(frames)
    assert out.shape == (2, 4, 8, 3)
    assert out[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255, 255, 0]


def test_an_error_while_decoding_leaves_no_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        yield smooth_frames(1)
        raise RuntimeError("out of memory")

    (tmp_path / "a.mp4").write_bytes(b"the old video")
    with pytest.raises(RuntimeError, match="out of memory"):
        save_video(tmp_path / "a.mp4", chunks(), fps=16, num_frames=9)
    assert (tmp_path / "a.mp4").read_bytes() == b"the old video"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_short_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="it has 5 frames, not 9"):
        save_video(tmp_path / "a.mp4", [smooth_frames(5)], fps=16, num_frames=9)
    assert not list(tmp_path.iterdir())


def test_ffmpeg_dying_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho Unknown encoder libx264 >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(
        InputError,
        match=r"ffmpeg says Unknown encoder libx264 .* Unset IMAGEIO_FFMPEG_EXE",
    ):
        check_output_folder(tmp_path / "out", [OutputEstimate("clip", 832, 480, 16)])
    assert not list((tmp_path / "out").iterdir())


def test_the_output_folder_is_tried_first(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "folder", [OutputEstimate("clip", 80, 48, 16)])
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_output_folder(tmp_path / "file", [OutputEstimate("clip", 80, 48, 16)])


def test_a_full_disk_is_an_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveError, match=r"cannot write .*x\.safetensors: .*No space left"):
        save_tensors(tmp_path / "x.safetensors", {"latents": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_an_image_is_lossless(tmp_path: Path) -> None:
    frame = smooth_frames(1)[0]
    save_image(tmp_path / "a.png", frame)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), frame.numpy())


def test_what_ctrl_c_sends_does_not_reach_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends it to the process group; the run finishes its step then, while the last
    video is still written.
    """
    ffmpeg, groups = tmp_path / "ffmpeg", tmp_path / "groups"
    ffmpeg.write_text(
        f'#!/bin/sh\ncut -d " " -f 5 /proc/$$/stat >> {groups}\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    save_video(tmp_path / "a.mp4", [smooth_frames(5)], fps=16, num_frames=5)
    write_sheet(tmp_path / "a.mp4", tmp_path / "a.jpg", num_frames=5)
    found = [int(line) for line in groups.read_text().splitlines()]
    assert len(found) == 3
    assert os.getpgrp() not in found
