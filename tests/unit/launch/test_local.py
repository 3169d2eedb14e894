"""``python -m launch local``: what it starts, and what it refuses before anything starts."""

import os
import signal
import sys
from pathlib import Path

import pytest

from launch import local
from launch.__main__ import main


class StartedError(Exception):
    pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    found: dict[str, object] = {}

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        found.update(path=path, command=command, environment=environment)
        raise StartedError

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    for key in ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PET_SIGNALS_TO_HANDLE"):
        monkeypatch.delenv(key, raising=False)
    return found


@pytest.mark.parametrize(
    ("gpus", "given", "num_ranks"),
    [(4, [], 4), (0, [], 1), (4, ["ranks=2"], 2), (0, ["ranks=2"], 2)],
)
def test_a_rank_for_each_gpu(
    gpus: int,
    given: list[str],
    num_ranks: int,
    started: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "find_gpus", lambda: [("a GPU", 80, 80)] * gpus)
    with pytest.raises(StartedError):
        main(["local", *given, "task=toy", "prompt=it's here"])
    launcher = (
        ["-m", "wan_dist.parallel.torchrun", "--nnodes=1", f"--nproc_per_node={num_ranks}"]
        if num_ranks > 1
        else []
    )
    command = started["command"]
    assert isinstance(command, list)
    assert command[: 1 + len(launcher)] == [sys.executable, *launcher]
    assert command[-4:] == ["-m", "wan_dist.run", "task=toy", "prompt=it's here"]
    assert started["environment"]["OMP_NUM_THREADS"] == str(32 // num_ranks)  # type: ignore[index]
    assert (
        f"OMP_NUM_THREADS={32 // num_ranks} PYTORCH_ALLOC_CONF=expandable_segments:True"
        in capsys.readouterr().err
    )


def test_a_file_of_jobs_is_checked_and_started(
    started: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.txt").write_text("two cats\na dog\n")
    settings = ["task=t2v-1.3B", f"jobs={tmp_path / 'jobs.txt'}", "parallel.dp=2"]
    with pytest.raises(StartedError):
        main(["local", "ranks=2", *settings])
    (tmp_path / "jobs.txt").write_text("two cats\n@none.txt\n")
    assert main(["local", "ranks=2", *settings]) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "is_set"),
    [("GeForce RTX 4090", True), ("GeForce RTX 3090", False), ("NVIDIA H200", False)],
)
def test_cards_that_cannot_reach_each_other(
    name: str,
    is_set: bool,
    started: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(local, "find_gpus", lambda: [(name, 80, 80)] * 2)
    with pytest.raises(StartedError):
        main(["local", "task=toy"])
    assert ("NCCL_P2P_DISABLE=1" in capsys.readouterr().err) is is_set


def test_what_nohup_ignores_torchrun_does_not_heed(started: dict[str, object]) -> None:
    for handler, signals in (
        (signal.SIG_DFL, "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        (signal.SIG_IGN, "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"),
    ):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with pytest.raises(StartedError):
                main(["local", "ranks=2", "task=toy"])
        finally:
            signal.signal(signal.SIGHUP, before)
        assert started["environment"]["PET_SIGNALS_TO_HANDLE"] == signals  # type: ignore[index]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_another_launchers_variables_do_not_reach_the_run(
    num_ranks: int,
    started: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "head",
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StartedError):
        main(["local", f"ranks={num_ranks}", "task=toy"])
    assert not {"SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "MASTER_ADDR"} & set(started["environment"])  # type: ignore[call-overload]
    assert (
        "$ env -u WORLD_SIZE -u MASTER_ADDR -u SLURM_STEP_NUM_TASKS OMP_NUM_THREADS="
        in capsys.readouterr().err
    )


def test_a_name_that_does_not_resolve_is_not_asked_for() -> None:
    assert {"--rdzv_endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"} <= set(
        local.build_run_command(2, [])
    )


def test_what_is_set_stays(started: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(StartedError):
        main(["local", "ranks=2", "task=toy"])
    assert started["environment"]["OMP_NUM_THREADS"] == "3"  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ranks=none", "task=toy"], "ranks=none is not a number of processes"),
        (["ranks=3", "task=toy", "parallel.ulysses=2"], "parallel.ulysses=2 does not fit 3 ranks"),
        (["ranks=2", "task=i2v-14B", "prompt=x"], "image"),
        (["ranks=2", "task=toy", "size=1*1"], "size=1x1"),
        (["ranks=2"], "task"),
    ],
)
def test_what_cannot_be_is_refused_first(
    arguments: list[str],
    message: str,
    started: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["local", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not started
