"""``python -m launch serve``: ranks that die are started again, and the service ends when it should."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import serve
from launch.__main__ import main
from launch.local import RunStart
from launch.serve import Supervisor

COUNT = "import os, sys; file = open(sys.argv[1], 'a'); file.write('x'); file.close(); "
COUNT += "number = os.path.getsize(sys.argv[1]); "


def supervise(file: Path, code: str) -> Supervisor:
    command = [sys.executable, "-c", COUNT + code, str(file)]
    return Supervisor(RunStart(command, dict(os.environ), ""))


@pytest.mark.parametrize(
    ("code", "num_starts", "exit_code"),
    [
        ("sys.exit(2)", 1, 2),
        ("sys.exit([1, 75, 2][number - 1])", 3, 2),
        ("os.kill(os.getpid(), 9) if number < 3 else sys.exit(0)", 3, 0),
    ],
)
def test_ranks_that_die_are_started_again(
    code: str, num_starts: int, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_MAX_PAUSE_SECONDS", 0.01)
    assert supervise(tmp_path / "starts", code).run() == exit_code
    assert (tmp_path / "starts").stat().st_size == num_starts


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "sys.exit(1)"])
def test_a_signal_ends_it(code: str, tmp_path: Path) -> None:
    """While the ranks work, and while there are none."""
    file = tmp_path / "starts"

    def ask() -> None:
        while not file.exists() or file.stat().st_size < (2 if "exit" in code else 1):
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(file, code).run() == (75 if "exit" in code else 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobs=a.txt"], "jobs and serve.port are both given"),
        (["serve.port=70000"], "serve.port=70000 must be 0 to 65535"),
        (["serve.host=10.0.0.1"], "serve.host=10.0.0.1 can be reached from other machines"),
        (["serve.max_queue=0"], "serve.max_queue=0 must be at least 1"),
        (["serve.max_upload_mib=0"], "serve.max_upload_mib=0.0 must be above 0"),
        (["size=65x64"], "the width must be a multiple of 16"),
    ],
)
def test_bad_settings_are_refused_at_once(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "task=toy", *words]) == 2
    assert message in capsys.readouterr().err
