"""``python -m launch doctor``: what it finds, on machines told of by a stand-in for nvidia-smi, and
on this one.
"""

import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.doctor import exchange, gpus, machine, software
from launch.doctor.findings import FAULT, NOTE, OK, Finding, run_checks
from tests.conftest import FIXTURES
from tests.forked import run_torchrun
from wan_dist import run
from wan_dist.parallel.mesh import Axis
from wan_dist.pipeline.session import find_device
from wan_dist.tasks.run_config import read_config

H200 = "NVIDIA H200, 580.1"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a stand-in first on the path, which runs a piece of shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def tells(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    return tells


def test_gpus_are_listed(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(
        f"echo '0, GPU-a, {H200}, 143771, 143000, 0'; "
        f"echo '1, GPU-b, {H200}, 143771, 9000, 3'; "
        f"echo '2, GPU-c, {H200}, 8, 8, [N/A]'"
    )
    found = list(gpus.check_gpus())
    assert [finding.verdict for finding in found] == [OK, FAULT, OK]
    assert "NVIDIA H200, 139.6 of 140.4 GiB free, driver 580.1" in found[0].message
    assert "3 uncorrected memory errors" in found[1].message


@pytest.mark.parametrize(
    ("visible", "verdicts"), [("1", [OK]), ("GPU-b,GPU-a", [OK, OK]), ("7", [FAULT]), ("", [FAULT])]
)
def test_gpus_that_are_hidden(
    visible: str,
    verdicts: list[str],
    nvidia_smi: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvidia_smi(
        f"echo '0, GPU-a, {H200}, 143771, 143000, 0'; echo '1, GPU-b, {H200}, 143771, 9000, 0'"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [finding.verdict for finding in gpus.check_gpus()] == verdicts


def test_a_driver_that_does_not_answer(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (finding,) = gpus.check_gpus()
    assert finding.verdict == FAULT
    assert "version mismatch" in finding.message
    assert "restart the machine" in finding.advice


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch built for CPUs")
def test_a_pytorch_for_cpus_beside_a_gpu_is_refused(
    nvidia_smi: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is opened or written; device=cpu asks for it, and hidden GPUs are not meant."""
    nvidia_smi("echo '0, GPU-0, NVIDIA H200, 143771, 143000'")
    (finding,) = [found for found in software.check_torch() if found.subject == "torch"]
    assert (finding.verdict, "pip install" in finding.advice) == (FAULT, True)
    settings = ["task=toy", f"output.dir={tmp_path / 'outputs'}"]
    assert run.main(settings) == 2
    told = capsys.readouterr().err
    assert [line.split()[1] for line in told.splitlines()] == ["video", "error:"]
    assert "is built for CPUs; pip install --force-reinstall torch --index-url " in told
    assert not (tmp_path / "outputs").exists()
    assert find_device(read_config([*settings, "device=cpu"])).type == "cpu"  # type: ignore[arg-type]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device(read_config(settings)).type == "cpu"  # type: ignore[arg-type]


def test_what_others_hold(nvidia_smi: Callable[[str], None]) -> None:
    code = """
import os, time
if child := os.fork():
    print(child)
else:
    os.close(1), os.close(2), time.sleep(60)
"""
    child = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    gpu_rows = "echo '0, GPU-a, 80000, 30000'; echo '1, GPU-b, 80000, 20000'"
    app_rows = f"echo 'GPU-a, {child}, 28000'; echo 'GPU-a, 99999999, 100'"
    nvidia_smi(f'case "$1" in *compute-apps*) {app_rows};; *) {gpu_rows};; esac')
    try:
        found = list(gpus.check_processes())
    finally:
        os.kill(child, 9)
    assert [finding.verdict for finding in found] == [FAULT, NOTE, FAULT]
    assert f"process {child} uses 27.3 GiB" in found[0].message
    assert f"kill {child}" in found[0].advice
    assert "ask who uses them" in found[1].advice
    assert "GPU 1: 19.5 GiB are used by processes that are not visible here" in found[2].message


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((10, 0), ["sm_90a", "sm_100a"], True),
        ((7, 5), ["sm_80"], False),
    ],
)
def test_builds_of_torch(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert software.is_built_for(capability, built) is runs


def test_variables_that_hurt() -> None:
    given = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_DISABLE": "0",
    }
    found = list(machine.check_variables(given))
    assert [finding.verdict for finding in found] == [FAULT, NOTE]
    assert not list(machine.check_variables({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}))


def test_little_shared_memory(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(
        "echo '0, GPU-a, NVIDIA H200, 143771, 143000'; echo '1, GPU-b, NVIDIA H200, 143771, 143000'"
    )
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage(64 * 2**20, 64 * 2**20))
    finding = list(machine.check_host_memory())[-1]
    assert (finding.subject, finding.verdict) == ("/dev/shm", FAULT)
    assert "--shm-size" in finding.advice


def test_a_check_that_breaks_is_a_finding() -> None:
    def breaks() -> list[Finding]:
        raise KeyError("x")

    (finding,) = run_checks([("thing", breaks)])
    assert finding.verdict == FAULT


def test_this_machine_and_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "task=t2v-1.3B", f"ckpt_dir={FIXTURES / 'wan2.1-t2v'}"])
    told = capsys.readouterr().out
    assert code == 0, told
    for subject in (
        "system",
        "host memory",
        "torch",
        "packages",
        "attention",
        "ffmpeg",
        "checkpoint",
        "plan",
    ):
        assert f"\nok     {subject} " in f"\n{told}"


def test_faults_make_the_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert main(["doctor", "task=t2v-1.3B", f"ckpt_dir={tmp_path}"]) == 1
    told = capsys.readouterr().out
    assert "\nFAULT  checkpoint" in told
    assert f"-> python -m launch fetch t2v-1.3B {tmp_path}" in told
    assert "2 faults" in told


def test_settings_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "task=t2v-1.3"]) == 2
    assert "t2v-1.3B" in capsys.readouterr().err


def test_ranks_exchange() -> None:
    told = run_torchrun(2, "launch", "doctor").stdout
    assert told.count("ok     system") == 1
    assert "2 ranks by gloo: all values correct" in told


def test_a_wrong_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert exchange._count_wrong_numbers(1024, Axis(), device) == 0

    def corrupting(x: torch.Tensor, axis: Axis) -> Callable[[], torch.Tensor]:
        x[0, 17] ^= 4
        return lambda: x

    monkeypatch.setattr(exchange, "all_to_all", corrupting)
    assert exchange._count_wrong_numbers(1024, Axis(), device) == 1


def test_a_rank_that_waits_for_ever_says_so() -> None:
    code = (
        "import launch.doctor.exchange as exchange; exchange._LIMIT = 2.0; "
        "from launch.__main__ import main; main(['doctor'])"
    )
    alone = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | alone,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "rank 1 on" in done.stderr
    assert "NCCL_P2P_DISABLE=1" in done.stderr


def test_what_one_rank_receives_wrongly_is_said_by_the_first() -> None:
    done = run_torchrun(2, "tests.corrupted")
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    assert "10 of 1315840 numbers arrived wrong on rank 1" in told
    assert "NCCL_P2P_DISABLE=1" in told
