"""An output folder that cannot take what a run will write is found before weights are read."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.output_section import OutputConfig
from wan_dist.output import output_check
from wan_dist.output.output_check import OutputEstimate, check_output_folder, estimate_output
from wan_dist.output.video_encoding import VideoEncoding
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.errors import InputError

SMALL = OutputEstimate("small", 80, 48, 16, 10_000, 20_000)
LARGE = OutputEstimate("large", 96, 64, 24, 2_000_000, 1_000_000)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and rates of the test videos, which these tests do without."""
    found: list[tuple[tuple[int, ...], int]] = []

    def encode(
        path: Path, chunks: Sequence[Tensor], *, fps: int, num_frames: int, encoding: VideoEncoding
    ) -> None:
        found.append((tuple(chunks[0].shape), fps))
        path.write_text("video")

    monkeypatch.setattr(output_check, "save_video", encode)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the file system was asked for."""
    found: list[int] = []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda descriptor, start, length: found.append(length)
    )
    return found


def set_free(count: int, monkeypatch: pytest.MonkeyPatch, *, blocks: int = 1000) -> None:
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda folder: SimpleNamespace(f_bavail=count // 1000, f_frsize=1000, f_blocks=blocks),
    )


def refuse_room(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)


def test_what_a_killed_check_has_left_is_removed_later(tmp_path: Path) -> None:
    old, new = (tmp_path / f"..wan-dist-probe-{name}.1a2b.partial.mp4" for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (1, 1))
    check_output_folder(tmp_path, [OutputEstimate("video", 64, 64, 16)])
    assert not old.exists()
    assert new.exists()


def test_too_little_room_is_said_with_both_numbers(
    tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(2_500_000, monkeypatch)
    with pytest.raises(
        InputError,
        match=r"output.dir=.*/out has no room .* need 3 MB or more, and only 2.5 MB are free; free",
    ):
        check_output_folder(tmp_path / "out", [SMALL, LARGE])
    assert not list((tmp_path / "out").iterdir())
    set_free(3_000_000, monkeypatch)
    check_output_folder(tmp_path / "out", [SMALL, LARGE])
    set_free(0, monkeypatch, blocks=0)  # of a file system that does not tell
    check_output_folder(tmp_path / "out", [SMALL, LARGE])
    assert len(encoded) == 2


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC])
def test_a_quota_is_found(
    code: int, tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_room(code, monkeypatch)
    with pytest.raises(
        InputError,
        match=rf"need 3 MB or more, and the file system refuses it \({os.strerror(code)}\)",
    ):
        check_output_folder(tmp_path, [LARGE])
    assert not encoded
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_be_asked_is_written_to(
    code: int, tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_room(code, monkeypatch)
    check_output_folder(tmp_path, [LARGE])
    assert len(encoded) == 1


@pytest.mark.parametrize("outcomes", [[SMALL, LARGE], [LARGE, SMALL]])
def test_the_largest_result_counts(
    outcomes: list[OutputEstimate], tmp_path: Path, encoded: list[Any], asked: list[int]
) -> None:
    check_output_folder(tmp_path / "new/folder", outcomes)
    assert asked == [LARGE.latents_bytes]
    assert encoded == [((2, 64, 96, 3), 24)]
    assert not list((tmp_path / "new/folder").iterdir())


def test_latents_and_frames_count_together(
    tmp_path: Path, encoded: list[Any], asked: list[int]
) -> None:
    check_output_folder(
        tmp_path,
        [
            OutputEstimate("a", 80, 48, 16, 500, 9_000),
            OutputEstimate("b", 96, 64, 24, 8_000, 1_000),
        ],
    )
    assert asked == [500]


def test_what_is_refused_is_what_a_video_takes(tmp_path: Path) -> None:
    config = compose_config(
        prepare_arguments(
            ["task=toy", "prompt=a ball", "size=64*64", "frame_num=5", "output.name=clip", "fps=8"]
        )
    )
    assert config is not None
    plan = make_plan(config)
    pixels = 64 * 64 * 5
    plain, with_tensor = (
        estimate_output(plan, OutputConfig(save_tensor=keeps)) for keeps in (False, True)
    )
    assert (plain.name, plain.width, plain.height, plain.fps) == ("clip", 64, 64, 8)
    assert plain.latents_bytes == with_tensor.latents_bytes == 4 * 16 * 2 * 8 * 8
    assert 0 < plain.frames_bytes < pixels
    assert with_tensor.frames_bytes - plain.frames_bytes == 3 * 4 * pixels


def test_a_name_that_is_too_long_for_the_file_system(
    tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encrypted folders allow 143 bytes."""
    monkeypatch.setattr(os, "pathconf", lambda folder, name: 143)
    names = ["short", "é" * 48, "ab" * 40]
    with pytest.raises(
        InputError,
        match=rf"output.name={names[1]} has 96 bytes; "
        r"the limit in output.dir=.* is 94, as suffixes are added",
    ):
        check_output_folder(tmp_path, [OutputEstimate(name, 80, 48, 16) for name in names])
    assert not list(tmp_path.iterdir())
    check_output_folder(tmp_path, [OutputEstimate("a" * 94, 80, 48, 16)])


def test_names_that_pass_can_be_written(tmp_path: Path, encoded: list[Any]) -> None:
    """All files of a result, as they are called while they are written and where they are damaged."""
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    longest = next(length for length in range(most, 0, -1) if passes(tmp_path, "a" * length))
    assert longest >= 200  # as names are allowed to be
    for suffix in (
        ".mp4",
        ".json",
        ".safetensors",
        ".latents.safetensors",
        f".{'0' * 12}.state.safetensors",
    ):
        file = tmp_path / ("a" * longest + suffix)
        with atomic_write(file) as aside:
            aside.write_text("")
        file.rename(f"{file}.damaged")


def passes(folder: Path, name: str) -> bool:
    try:
        check_output_folder(folder, [OutputEstimate(name, 80, 48, 16)])
    except InputError:
        return False
    return True


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_nothing_is_left_where_writing_fails(
    code: int, tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "statvfs", fail)
    with pytest.raises(
        InputError,
        match=f"output.dir=.* cannot be written: {os.strerror(code)}; use another output.dir",
    ):
        check_output_folder(tmp_path, [LARGE])
    assert not list(tmp_path.iterdir())
