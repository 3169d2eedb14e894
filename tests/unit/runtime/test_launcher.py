"""What a task of srun takes from Slurm in place of torchrun's variables."""

import os
from pathlib import Path

import pytest

from wan_dist.runtime import launcher
from wan_dist.runtime.environment import read_rank_layout, sanitize_environment
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.launcher import expand_host_list, translate_slurm_variables

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = dict(TASK)
    monkeypatch.setattr("os.environ", found)
    return found


def test_a_task_knows_its_place(environment: dict[str, str]) -> None:
    translate_slurm_variables()
    assert [environment[key] for key in SET[:5]] == ["5", "1", "7", "2", "gpu03"]
    assert 20000 <= int(environment["MASTER_PORT"]) < 32000


def test_steps_of_a_job_have_ports_of_their_own(environment: dict[str, str]) -> None:
    ports = set()
    for job, step in ((4711, 0), (4711, 1), (4712, 0), (4713, 3)):
        environment |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        environment.pop("RANK", None)
        environment.pop("MASTER_PORT", None)
        translate_slurm_variables()
        ports.add(environment["MASTER_PORT"])
    assert len(ports) == 4


def test_what_is_set_stays(environment: dict[str, str]) -> None:
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    translate_slurm_variables()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1")


@pytest.mark.parametrize("gone", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_batch_script_is_no_task(gone: str, environment: dict[str, str]) -> None:
    environment |= {"SLURM_NTASKS": "7"}
    del environment[gone]
    translate_slurm_variables()
    assert not set(SET) & set(environment)


@pytest.mark.parametrize("key", [*SET, "SLURM_JOB_ID", "SLURM_NODEID"])
def test_what_is_set_to_nothing_is_not_set(key: str, environment: dict[str, str]) -> None:
    environment |= {key: " "}
    sanitize_environment()
    translate_slurm_variables()
    assert read_rank_layout(environment).num_ranks == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_PROCID": ""}, "without SLURM_PROCID"),
        ({"SLURM_LOCALID": ""}, "without SLURM_LOCALID"),
        ({"SLURM_PROCID": "five"}, "SLURM_PROCID=five"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, "SLURM_STEP_TASKS_PER_NODE=2(x3 "),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x999999999)", "SLURM_NODEID": "999999999"},
            "has 999999999 nodes",
        ),
        (
            {"SLURM_NODEID": "4"},
            "SLURM_NODEID=4 in the environment, but SLURM_STEP_TASKS_PER_NODE=2(x3),1 has 4 nodes",
        ),
        (
            {"SLURM_STEP_NODELIST": "gpu[a-b]"},
            "gpu[a-b] in the environment is not Slurm's list of hosts",
        ),
        ({"SLURM_STEP_NODELIST": "gpu["}, "gpu[ in the environment is not Slurm's list of hosts"),
        ({"SLURM_JOB_ID": "job"}, "SLURM_JOB_ID=job"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 in the environment, but srun has set 7"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment, but srun has set 1"),
    ],
)
def test_what_slurm_does_not_set_so_is_refused(
    changed: dict[str, str], message: str, environment: dict[str, str]
) -> None:
    environment |= changed
    with pytest.raises(InputError) as refused:
        translate_slurm_variables()
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("command", "is_shell"),
    [
        (["bash"], True),
        (["/bin/bash", "-i"], True),
        (["-bash", "--login"], True),
        (["zsh", "-l"], True),
        (["bash", "job.sh"], False),
        (["bash", "-c", "make"], False),
        (["sh", "-lc", "make"], False),
        (["python", "-m", "wan_dist.run"], False),
    ],
)
def test_a_shell_of_srun_is_alone(
    command: list[str],
    is_shell: bool,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "cmdline").write_text("".join(f"{word}\0" for word in command))
    monkeypatch.setattr(
        "wan_dist.runtime.launcher.Path",
        lambda path: tmp_path / "cmdline" if str(path).startswith("/proc") else Path(path),
    )
    environment |= {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_PTY_PORT": "4242",
    }
    translate_slurm_variables()
    assert (read_rank_layout(environment).num_ranks == 1) is is_shell


def test_without_a_terminal_it_is_a_task(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    monkeypatch.setattr("os.getsid", lambda _: pytest.fail("nobody asked for a terminal"))
    translate_slurm_variables()
    assert read_rank_layout(environment).num_ranks == 7


def test_ranks_of_torchrun_are_torchruns(environment: dict[str, str]) -> None:
    environment["RANK"] = "0"
    translate_slurm_variables()
    assert "WORLD_SIZE" not in environment


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("gpu[009-011,9],login", ["gpu009", "gpu010", "gpu011", "gpu9", "login"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("n[7]-ib", ["n7-ib"]),
        ("n-1,n-2", ["n-1", "n-2"]),
    ],
)
def test_hosts_of_a_list(nodes: str, hosts: list[str]) -> None:
    assert expand_host_list(nodes) == hosts


def test_who_has_adopted_a_rank_is_not_taken_for_its_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "0")
    killed: list[str] = []
    monkeypatch.setattr(launcher, "detect_launcher", lambda: "torchrun")
    monkeypatch.setattr(
        launcher.subprocess, "Popen", lambda command, **_: killed.append(command[3])
    )
    monkeypatch.setattr(launcher, "_parent_pid", os.getppid())
    launcher.schedule_launcher_kill()
    assert killed == [str(os.getppid())]
    monkeypatch.setattr(os, "getppid", lambda: 1)
    launcher.schedule_launcher_kill()
    assert len(killed) == 1
