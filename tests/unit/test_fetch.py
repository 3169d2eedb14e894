"""``python -m launch fetch``: what is asked for of the Hugging Face hub, and that what came is whole."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from launch.__main__ import main
from tests.conftest import FIXTURES
from wan_dist.weights import hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repositories that were asked for; a tiny checkpoint comes instead."""
    found: list[str] = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path | None) -> str:
        assert local_dir is not None
        found.append(repository)
        shutil.copytree(FIXTURES / "wan2.1-t2v", local_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected"))
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return found


def test_it_says_how_to_use_what_came(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "weights"
    assert main(["fetch", "t2v-1.3B", str(folder)]) == 0
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B"]
    said = capsys.readouterr().out
    assert f"{folder} is whole" in said
    assert f'python -m wan_dist.run task=t2v-1.3B ckpt_dir={folder} size=832*480 prompt="..."' in said


@pytest.mark.parametrize(("size", "repository"), [("832*480", "Wan-AI/Wan2.1-I2V-14B-480P"), ("1280*720", "Wan-AI/Wan2.1-I2V-14B-720P")])
def test_it_fetches_the_checkpoint_for_the_size(
    size: str, repository: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "i2v-14B", str(tmp_path), f"size={size}"]) == 2
    assert asked == [repository]
    assert "is not a whole i2v-14B checkpoint" in capsys.readouterr().err  # the tiny one has no image encoder


def test_a_truncated_file_is_found(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    come = hub.snapshot_download

    def cut(*arguments: str, **options: object) -> str:
        folder = Path(come(*arguments, **options))
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", cut)
    assert main(["fetch", "t2v-1.3B", str(tmp_path)]) == 2
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fetch takes a task and a folder"),
        (["t2v-14B", "a", "b"], "fetch takes a task and a folder"),
        (["t2v-14", "a"], "there is no task 't2v-14'"),
        (["toy", "a"], "needs no download"),
        (["t2v-14B", "a", "size=big"], "size=big"),
    ],
)
def test_bad_input(arguments: list[str], message: str, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not asked


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert main(["fetch", "t2v-14B", str(tmp_path)]) == 2
    assert "could not be downloaded" in capsys.readouterr().err
