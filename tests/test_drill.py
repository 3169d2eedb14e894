"""A small drill: see bench/drill.py."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.drill import choose_faults
from bench.faults import FAULTS, build_fsync, damage

KINDS = (
    *("failing fsync", "a vanished image", "SIGINT", "damaged files", "edited jobs"),
    *("power cut", "SIGHUP", "two single runs"),
)


def test_a_run_with_faults_ends_as_one_without(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.drill", "--jobs", "12", "--ranks", "2", "--steps", "10"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json"), "--kinds", *KINDS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["found"] == []
    assert found["failed_fsyncs"] or found["notes"]
    assert sum(found["faults"].values()) + len(found["notes"]) >= len(KINDS)


def test_every_kind_of_fault_is_drilled() -> None:
    assert set(KINDS) < set(FAULTS)
    assert set(choose_faults(60, list(FAULTS), random.Random(0))) == set(FAULTS)


def test_fsync_fails_or_has_no_effect(tmp_path: Path) -> None:
    fsync = build_fsync(tmp_path)
    if fsync is None:
        pytest.skip("there is no C compiler")
    code = """
import os, sys
codes = []
for name in ("a", "b"):
    with open(name, "w") as file:
        try:
            os.fsync(file)
            codes.append(0)
        except OSError as error:
            codes.append(error.errno)
print(*codes)
"""

    def told() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=fsync.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert told() == "0 0"
    inodes = {(tmp_path / name).stat().st_ino for name in "ab"}
    assert fsync.synced == inodes
    fsync.set_mode("f")
    assert told() == "5 0"
    assert fsync.num_failures == 1
    (tmp_path / "a").unlink()
    (tmp_path / "fsync.synced").unlink()
    fsync.set_mode("l")
    assert told() == "0 0"
    assert fsync.synced == set()


def test_a_damaged_file_is_another(tmp_path: Path) -> None:
    file, chance, whole = tmp_path / "file", random.Random(0), bytes(range(200))
    seen = set()
    for _ in range(20):
        file.write_bytes(whole)
        damage(file, chance)
        assert file.read_bytes() != whole
        seen.add(file.stat().st_size)
    assert seen == {0, 100, 200}
