"""Frames that are written to a safetensors file as they arrive."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_dist.output import frames_file
from wan_dist.output.frames_file import FramesWriter
from wan_dist.output.video_file import SaveError


def test_the_file_has_all_frames_by_channel(tmp_path: Path) -> None:
    frames = torch.randn(7, 6, 10, 3)
    writer = FramesWriter(tmp_path / "a.safetensors", 7)
    for chunk in frames.split(3):
        writer.write(chunk)
    assert not (tmp_path / "a.safetensors").exists()
    writer.finish()
    video = load_file(tmp_path / "a.safetensors")["video"]
    assert torch.equal(video, frames.permute(3, 0, 1, 2))


def test_parts_of_a_write_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(frames_file.os, "pwrite", lambda fd, data, at: write(fd, data[:100], at))
    frames = torch.randn(2, 8, 8, 3)
    writer = FramesWriter(tmp_path / "a.safetensors", 2)
    writer.write(frames)
    writer.finish()
    video = load_file(tmp_path / "a.safetensors")["video"]
    assert torch.equal(video, frames.permute(3, 0, 1, 2))


def test_nothing_is_left_of_a_video_that_is_not_finished(tmp_path: Path) -> None:
    writer = FramesWriter(tmp_path / "a.safetensors", 2)
    writer.write(torch.zeros(1, 4, 4, 3))
    assert len(list(tmp_path.iterdir())) == 1
    writer.close()
    assert not list(tmp_path.iterdir())
    FramesWriter(tmp_path / "b.safetensors", 2).close()


def test_missing_frames_and_a_full_disk_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FramesWriter(tmp_path / "a.safetensors", 2)
    writer.write(torch.zeros(1, 4, 4, 3))
    with pytest.raises(SaveError, match="1 frames came, not 2"):
        writer.finish()

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames_file.os, "pwrite", fail)
    writer = FramesWriter(tmp_path / "a.safetensors", 2)
    with pytest.raises(SaveError, match=r"a\.safetensors: .*No space left"):
        writer.write(torch.zeros(1, 4, 4, 3))
    assert not list(tmp_path.iterdir())
