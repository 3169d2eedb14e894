"""A small drill: see bench/drill.py."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_beaten_ends_as_one_in_peace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.drill", "--jobs", "8", "--ranks", "2", "--blows", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == []
    assert sum(found["blows"].values()) == 2
