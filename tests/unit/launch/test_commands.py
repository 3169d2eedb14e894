"""The command ``wan-dist``, wherever it is called."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import __main__ as launch
from wan_dist import __main__ as command
from wan_dist import usage
from wan_dist.runtime import environment

ROOT = Path(__file__).parents[3]
PLAN = ["plan", "task=t2v-1.3B", "gpus=8GB", "host=16GB"]


def test_the_script_is_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    module, _, function = scripts["wan-dist"].partition(":")
    assert getattr(importlib.import_module(module), function) is command.main


@pytest.mark.parametrize("place", ["a file here", "a package here", "a package on PYTHONPATH"])
def test_another_launch_is_not_taken(place: str, tmp_path: Path) -> None:
    if place == "a file here":
        (tmp_path / "launch.py").write_text("raise SystemExit('another program')")
    else:
        (tmp_path / "launch").mkdir()
        (tmp_path / "launch/__init__.py").write_text("raise SystemExit('another program')")
    path, folder = [str(ROOT)], tmp_path
    if "PYTHONPATH" in place:
        path, folder = [str(tmp_path), str(ROOT)], Path("/")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-m", "wan_dist", *PLAN],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "denoise" in done.stdout


def test_one_that_is_imported_already_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "launch"}
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "launch", sys)
    monkeypatch.setitem(sys.modules, "launch.__main__", sys)
    monkeypatch.setattr(sys, "argv", ["wan-dist", *PLAN])
    assert command.main() == 0
    assert "denoise" in capsys.readouterr().out
    assert sys.modules["launch"].__file__ == str(ROOT / "launch/__init__.py")
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        del sys.modules[name]
    sys.modules.update(ours)


def test_run_is_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wan-dist"])
    assert " | ".join(launch.COMMANDS) == usage.OTHER_COMMANDS
    assert launch.main(["run", "--help"]) == 0
    assert "python -m wan_dist.run task=NAME" in capsys.readouterr().out
    assert launch.main(["run", "task=none"]) == 2
    assert capsys.readouterr().err.startswith("wan_dist: error: ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("run", *launch.COMMANDS))


def test_without_docstrings_there_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Flags:
        optimize = 2

    monkeypatch.setattr(environment.sys, "flags", Flags)
    assert launch.main(PLAN) == 2
    assert "PYTHONOPTIMIZE=2" in capsys.readouterr().err


def test_a_plan_for_a_gpu_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["plan", "task=t2v-1.3B", "host=64GB"]
    assert launch.main([*settings, "gpus=2xH200"]) == launch.main([*settings, "gpus=2x140GB"]) == 0
    by_name, by_size = capsys.readouterr().out.split("t2v-1.3B: ")[1:]
    assert by_name == by_size
    assert launch.main([*settings, "gpus=2xH900"]) == 2
    assert "gpus=h900 is not an amount of memory" in capsys.readouterr().err
