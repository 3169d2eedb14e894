"""What becomes of a run when one of its ranks fails: all end within seconds, and what is said last
names the cause.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import HANG_SECONDS, run_ranks, run_torchrun, start_ranks
from wan_dist.run import main
from wan_dist.runtime.signals import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
TOY = [
    "task=toy",
    "size=64*48",
    "frame_num=5",
    "sample.steps=4",
    "parallel.ulysses=2",
    "device=cpu",
]


def start(
    program: list[str], folder: Path, launcher: str = "torch.distributed.run", **environment: str
) -> subprocess.Popen[str]:
    """Start two ranks under torchrun, in a process group of their own."""
    options = ["--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-W", "ignore", "-m", launcher, *options, *program]
    settings = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        | environment
    )
    return subprocess.Popen(
        command,
        cwd=folder,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def nothing_is_left(group: int) -> bool:
    """Whether the process group has no live member."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_one_rank_failing_ends_all(tmp_path: Path) -> None:
    job = start(["-m", "tests.ranks.failing", *TOY], tmp_path, BREAK_RANK="0")
    told, _ = job.communicate(timeout=HANG_SECONDS)
    check_failure(job.returncode, told, 0)
    assert nothing_is_left(job.pid)


def test_one_sharded_rank_failing_ends_all(tmp_path: Path) -> None:
    settings = [*TOY, "fsdp.dit=true", f"output.dir={tmp_path}"]
    done = run_torchrun(2, "tests.ranks.failing", *settings, BREAK_RANK="1")
    check_failure(done.returncode, done.stdout + done.stderr, 1)


def check_failure(code: int | None, told: str, rank: int) -> None:
    assert code != 0
    assert told.count("wan_dist: error: RuntimeError: this rank broke") == 1
    summary = told[told.index("Root Cause") :]
    assert f"rank      : {rank} " in summary
    assert "RuntimeError: this rank broke" in summary


def test_ranks_take_less_together_where_one_has_no_room(tmp_path: Path) -> None:
    settings = [*TOY, "memory.vae=whole", "output.save_tensor=true", f"output.dir={tmp_path}"]
    outcomes = {}
    for failures in (0, 2, 9):
        done = start_ranks(
            *(2, "tests.ranks.scarce", *settings, f"output.name=after-{failures}"),
            FAILURES=str(failures),
        )
        outcomes[failures] = "".join(one.stderr for one in done)
        assert [one.returncode == 0 for one in done] == [failures < 9] * 2, outcomes[failures]
    words = outcomes[2]
    assert [
        line.partition("repeated with the ")[2]
        for line in words.splitlines()
        if "ran out of GPU memory" in line
    ] == [
        "transformer resident, 8192 tokens at a time",
        "transformer resident, 8192 tokens at a time, passes apart",
    ]
    videos = [load_file(tmp_path / f"after-{failures}.safetensors")["video"] for failures in (0, 2)]
    assert torch.equal(*videos)
    assert "rank 1 of the replica has no 0.1 GiB left on its GPU" in outcomes[9]
    assert "a smaller size or fewer frames would take less" in outcomes[9]


@pytest.mark.parametrize("kind", ["easy", "tea"])
def test_ranks_guess_the_same_steps(kind: str, tmp_path: Path) -> None:
    settings = [
        *TOY,
        "sample.steps=10",
        f"cache.steps={kind}",
        "cache.threshold=2",
        "output.save_tensor=true",
        "dtype=float32",
        f"output.dir={tmp_path}",
    ]
    run_ranks(2, "wan_dist.run", *settings, "output.name=two")
    alone = [setting for setting in settings if not setting.startswith("parallel.")]
    assert main([*alone, "output.name=one"]) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")}
    assert records["one"]["guessed_steps"] == records["two"]["guessed_steps"] > 0
    assert ["denoise" in stages for stages in records["two"]["other_ranks"]] == [True]
    assert records["one"]["other_ranks"] == []
    videos = [load_file(tmp_path / f"{name}.safetensors")["video"] for name in ("one", "two")]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)


def test_bad_input_is_said_once() -> None:
    done = run_torchrun(2, "wan_dist.run", *TOY, "frame_num=6")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert told.count("wan_dist: error: frame_num=6 is not 4n + 1") == 1


LOCAL = "wan_dist.parallel.torchrun"
"""What `launch local` starts."""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["wan_dist.run", *TOY, "frame_num=6"], 2, "frame_num=6 is not 4n + 1"),
        (["wan_dist.run", *TOY, "ckpt_dir=none"], 2, "ckpt_dir=none is not a folder"),
        (["tests.ranks.failing", *TOY], 1, "RuntimeError: this rank broke"),
    ],
)
def test_a_launcher_adds_nothing_to_what_ranks_say(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    module, *settings = arguments
    told_to = {"LAUNCHER": LOCAL, "BREAK_RANK": "1"}
    done = run_torchrun(2, module, *settings, f"output.dir={tmp_path}", **told_to)
    told = done.stdout + done.stderr
    assert done.returncode == code, told
    assert told.count(f"wan_dist: error: {message}") == 1, told
    assert "elastic" not in told  # neither torchrun's log nor its traceback


def test_a_rank_that_is_killed_early_is_named(tmp_path: Path) -> None:
    kill = "import os; os.kill(os.getpid(), 9)"
    (tmp_path / "killed.py").write_text(f"if __import__('os').environ['RANK'] == '1': {kill}\n")
    job = start(["-m", "killed"], tmp_path, LOCAL, PYTHONPATH=f"{ROOT}:{tmp_path}")
    told, _ = job.communicate(timeout=HANG_SECONDS)
    assert job.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(r"wan_dist: error: rank 1 \(process \d+\) was killed by SIGKILL\n", told), (
        told
    )


@pytest.mark.parametrize(
    ("how", "launcher"),
    [
        (signal.SIGINT, "torch.distributed.run"),
        (signal.SIGTERM, "torch.distributed.run"),
        (signal.SIGTERM, LOCAL),
    ],
)
def test_stopping_leaves_no_process(how: signal.Signals, launcher: str, tmp_path: Path) -> None:
    settings = [*TOY, "frame_num=33", "sample.steps=1000"]
    job = start(["-m", "wan_dist.run", *settings], tmp_path, launcher)
    assert job.stdout is not None
    for line in iter(job.stdout.readline, ""):
        if "] attention" in line:
            break
    else:
        pytest.fail("it has ended")
    time.sleep(1)  # it is denoising now
    os.kill(job.pid, how)
    told, _ = job.communicate(timeout=HANG_SECONDS)
    assert job.returncode == (EXIT_PREEMPTED if launcher == LOCAL else 1), told
    assert ("Traceback" in told) == (launcher != LOCAL), told
    assert told.count("run the same command again") == 1, told
    assert not list(tmp_path.glob("outputs/*.mp4")), (
        "it was to end long before its 1000 steps are done"
    )
    assert nothing_is_left(job.pid)
