"""A folder of videos made by an earlier version (commit 477a388): it resumes, and is listed.

One job was done, the next one was stopped after 4 of 6 steps.
"""

import json
import shutil
from pathlib import Path

import pytest

from launch.__main__ import main as launch
from tests.conftest import FIXTURES
from wan_dist.run import main

TOY = ["task=toy", "dtype=float32", "size=64*48", "frame_num=5", "sample.steps=6", "device=cpu"]
DONE, STOPPED = "a-red-ball-moving-left-c705626d", "a-blue-star-growing-369926ce"


def test_a_run_of_an_earlier_version_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / "earlier-run", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / f"out/{DONE}.mp4").read_bytes()
    assert main([*TOY, "jobs=prompts.txt", "output.dir=out", "cache.dir=null"]) == 0
    told = capsys.readouterr().err
    assert "jobs      2: 1 done before, 1 to make" in told
    assert f"continues from step 4 of 6 (out/{STOPPED}." in told
    assert (tmp_path / f"out/{DONE}.mp4").read_bytes() == before
    assert json.loads((tmp_path / f"out/{STOPPED}.json").read_text())["status"] == "done"
    assert not list((tmp_path / "out").glob("*.state.safetensors"))


def test_a_run_of_an_earlier_version_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(FIXTURES / "earlier-run/out", tmp_path, dirs_exist_ok=True)
    assert launch(["gallery", str(tmp_path)]) == 0
    assert DONE in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert launch(["runs", str(tmp_path)]) == 0
    assert DONE in capsys.readouterr().out
