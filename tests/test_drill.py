"""A small drill: see bench/drill.py."""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.drill import choose_faults, main
from bench.faults import FAULTS, Run, build_fsync, damage
from tests.forked import ForkServer


def test_a_run_with_faults_ends_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of fault once, first those that need jobs that are left. The runs and torchrun are forked."""
    servers: list[ForkServer] = []

    def fork(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Run:
        if not servers:
            servers.append(ForkServer(environment))  # which has what LD_PRELOAD says
        _, module, *rest = arguments
        if module == "torch.distributed.run":
            module = "tests.forked_torchrun"
        return servers[0].start([module, *rest], environment, (log, log))

    kinds = sorted(FAULTS, key=lambda kind: kind not in ("failing fsync", "a vanished image"))
    found_file = tmp_path / "found.json"
    options = ["--jobs", "10", "--ranks", "2", "--steps", "6", "--out", str(found_file)]
    monkeypatch.setattr(sys, "argv", ["drill", *options, "--kinds", *kinds])
    with pytest.raises(SystemExit) as end:
        main(fork, start_seconds=1.5)
    servers[0].close()
    assert end.value.code == 0
    found = json.loads(found_file.read_text())
    assert found["found"] == []
    assert found["failed_fsyncs"] or found["notes"]
    assert sum(found["faults"].values()) + len(found["notes"]) >= len(FAULTS)


def test_faults_are_of_every_kind() -> None:
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
