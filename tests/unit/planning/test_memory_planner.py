"""What memory there is, what a run would take of it, and which arrangement is chosen; all without a GPU."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main as launch
from wan_dist import run
from wan_dist.planning import hardware
from wan_dist.planning.hardware import find_gpus, find_host_memory, parse_bytes, parse_gpus
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

GIB = 2**30


def planned(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert launch(["plan", *arguments.split()]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert launch(["plan", *arguments.split()]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "arrangement"),
    [
        (
            "task=t2v-14B gpus=141GB host=512GB",
            "transformer resident; text encoder whole; VAE whole",
        ),
        (
            "task=i2v-14B size=1280*720 gpus=8x80GB host=512GB",
            "transformer sharded; text encoder whole; VAE parallel",
        ),
        (
            "task=i2v-14B size=832*480 gpus=48GB host=128GB",
            "transformer resident; text encoder whole; VAE whole",
        ),
        (
            "task=i2v-14B size=832*480 gpus=24GB host=64GB",
            "transformer streamed; text encoder whole; VAE whole",
        ),
        (
            "task=i2v-14B size=832*480 gpus=8GB host=16GB",
            "transformer from disk; text encoder block by block; VAE whole",
        ),
        (
            "task=i2v-14B size=832*480 gpus=4GB host=16GB",
            "transformer from disk, 8192 tokens at a time, passes apart",
        ),
        (
            "task=i2v-14B size=832*480 frame_num=41 gpus=3GB host=64GB",
            "text encoder block by block; CLIP on the CPU; VAE in 2 tiles",
        ),
        (
            "task=t2v-1.3B gpus=8GB host=16GB",
            "transformer resident; text encoder block by block; VAE whole",
        ),
        (
            "task=ti2v-5B gpus=6GB host=16GB",
            "transformer streamed; text encoder block by block; VAE in 2 tiles",
        ),
        (
            "task=ti2v-5B gpus=8GB host=16GB",
            "transformer streamed; text encoder block by block; VAE in 2 tiles",
        ),
        (
            "task=t2v-14B gpus=24GB host=64GB memory.dit=disk memory.vae=tiled",
            "transformer from disk",
        ),
    ],
)
def test_the_fastest_arrangement_that_fits(
    arguments: str, arrangement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arrangement in planned(arguments, capsys)


def test_the_plan_is_a_table_in_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        "-m",
        "launch",
        "plan",
        "task=i2v-14B",
        "size=1280*720",
        "gpus=8x80GB",
        "host=512GB",
    ]
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5  # 0.4 s of computing
    _, table = told.split("\n\n")
    rows = [line.split()[0] for line in table.splitlines()]
    assert rows == [
        "GiB",
        "text",
        "look",
        "image",
        "context",
        "load",
        "denoise",
        "decode",
        "available",
    ]
    assert "8 ranks, dp 1 x cfg 2 x ring 1 x ulysses 4" in told


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, launch.__main__ as m; m.main(['plan', 'task=toy', 'gpus=8GB', 'host=8GB']); "
        "sys.exit(int('torch' in sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=Path(__file__).parents[3],
            capture_output=True,
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "task=i2v-14B size=832*480 gpus=24GB host=64GB memory.budget_gib=1",
            "context needs 1.2 GiB of GPU memory, of which 1.0 can",
        ),
        (
            "task=i2v-14B size=832*480 gpus=20GB host=64GB memory.dit=resident",
            "it fits, with the transformer streamed",
        ),
        ("task=i2v-14B size=1280*720 gpus=8GB host=64GB memory.vae=whole frame_num=81", None),
        (
            "task=i2v-14B size=1280*720 gpus=6GB host=64GB memory.vae=whole",
            "decode needs 6.7 GiB of GPU memory",
        ),
        ("task=t2v-14B size=1280*720 gpus=4GB host=64GB", "frame_num="),
        (
            "task=t2v-14B gpus=80GB host=1GB",
            "2.3 GiB of host memory, of which 1.0 can be used (host)",
        ),
        (
            "task=t2v-14B gpus=24GB host=16GB memory.dit=stream",
            "host memory, of which 16.0 can be used",
        ),
        ("task=t2v-14B gpus=80GB host=64GB memory.host_budget_gib=1", "(memory.host_budget_gib)"),
        ("task=t2v-14B gpus=80", "gpus=80 is not an amount of memory, e.g. gpus=80GB"),
        ("task=t2v-14B gpus=0x80GB", "at least one GPU"),
        ("task=t2v-14B nodes=none gpus=80GB", "nodes=none is not a number of machines"),
        (
            "task=t2v-14B gpus=80GB memory.dti=disk",
            "unknown key 'memory.dti'; did you mean 'memory.dit'?",
        ),
        ("task=t2v-14B gpus=80GB memory.t5=moon", "memory.t5=moon is not one of gpu, stream, cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    arguments: str, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if message is None:
        planned(arguments, capsys)
    else:
        assert message in refused(arguments, capsys)


def test_help_of_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([]) == 0
    assert launch(["plan", "--help"]) == 0
    assert "python -m launch plan task=i2v-14B" in capsys.readouterr().out
    assert launch(["plna"]) == 2


def test_amounts_of_memory() -> None:
    assert (
        parse_bytes("80GB", "host")
        == parse_bytes("80 GiB", "host")
        == parse_bytes("80g", "host")
        == 80 * GIB
    )
    assert parse_bytes("1.5TB", "host") == 1536 * GIB
    assert parse_gpus("8x80GB") == parse_gpus("8 * 80GB") == (8, 80 * GIB)
    assert parse_gpus("24GB") == (1, 24 * GIB)
    with pytest.raises(InputError, match="host=much"):
        parse_bytes("much", "host")


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(version: int, tmp_path: Path) -> None:
    inner = tmp_path / ("memory/job/step" if version == 1 else "job/step")
    inner.mkdir(parents=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    (inner / names[0]).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (inner.parent / names[0]).write_text(f"{8 * GIB}\n")
    (inner.parent / names[1]).write_text(f"{3 * GIB}\n")
    (inner.parent / "memory.stat").write_text(
        f"anon 5\n{'total_' * (version == 1)}inactive_file {GIB}\n"
    )
    membership = tmp_path / "membership"
    membership.write_text("4:cpu:/else\n7:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    assert hardware._find_cgroup_bytes(tmp_path, membership) == 6 * GIB


def test_slurms_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert find_host_memory() == (512 * 2**20, "Slurm's limit")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1024")
    assert find_host_memory()[1] != "Slurm's limit"


def test_free_memory_below_the_need_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "_read_free_bytes", lambda: 150 * 2**20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("wan_dist.weights.component.Component.load", None)
    settings = ["task=toy", "device=cpu", "size=64*48", "frame_num=5", f"output.dir={tmp_path}"]
    assert run.main(settings) == 2
    assert "can be used (free memory)" in capsys.readouterr().err


def test_a_limit_below_the_need_is_refused_before_loading(tmp_path: Path) -> None:
    """300 MiB are left below the limit on addresses: the run ends with exit code 2 before any weights
    are read.
    """
    code = (
        "import resource, sys, torch, transformers, wan_dist.pipeline.generate;"
        "import wan_dist.planning.hardware as hardware; from wan_dist.run import main;"
        "from wan_dist.weights.component import Component; Component.load = None;"
        "limit = hardware._read_address_space_bytes() + 300 * 2**20;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "sys.exit(main(['task=toy', 'device=cpu', 'size=64*48', 'frame_num=5', "
        f"'output.dir={tmp_path}']))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "can be used (the process's limit (ulimit -v))" in done.stderr


def test_gpus_as_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho '0, GPU-a, NVIDIA H200, 143771, 143000'\n"
        "echo '1, GPU-b, NVIDIA H200, 143771, 1000'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [free for _, _, free in find_gpus()] == [143000 * 2**20, 1000 * 2**20]
    for visible in ("1", "GPU-b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_gpus() == [("NVIDIA H200", 143771 * 2**20, 1000 * 2**20)]
    monkeypatch.setenv("PATH", "")
    assert find_gpus() == []


NAMES = {"0": "a", "GPU-8f2e-11": "a", "1": "b", "GPU-8f3c-22": "b", "2": "c", "GPU-11aa-33": "c"}
MIGS = {"MIG-77-1": "m", "MIG-GPU-8f2e-11/1/0": "n"}


@pytest.mark.parametrize(
    ("given", "seen", "said"),
    [
        ("", "", ""),
        ("-1", "", ""),
        ("NoDevFiles", "", ""),
        ("1", "b", ""),
        ("2, 0", "ca", ""),
        ("01", "b", ""),
        ("0,-1,1", "a", ""),
        ("0,9,1", "a", "'9' is no GPU here, and CUDA ignores the rest"),
        ("0,x,1", "a", "'x' is no GPU here"),
        ("0,,1", "a", "'' is no GPU here"),
        ("1,0,1", "", "'1' is named twice, and CUDA ignores all"),
        ("GPU-8f2e", "a", ""),
        ("GPU-11,GPU-8f3", "cb", ""),
        ("GPU-8f", "", "'GPU-8f' is no GPU here"),
        ("GPU-8f2e,GPU-8f2e-11", "", "named twice"),
        ("GPU-11,0", "c", "'0' is no GPU here"),
        ("0,GPU-11", "a", "'GPU-11' is no GPU here"),
        ("MIG-77-1", "m", ""),
        ("MIG-77", "m", ""),
        ("MIG-GPU-8f2e-11/1/0,MIG-77-1", "n", ""),
        ("MIG-GPU-8f2e-11/2/0", "", "is no GPU here"),
    ],
)
def test_gpus_that_are_visible(
    given: str,
    seen: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    hardware._warn_once.cache_clear()
    for _ in range(2):
        assert "".join(hardware.filter_visible_gpus(NAMES | MIGS)) == seen
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text


def test_a_part_of_a_gpu_has_its_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = (
        "GPU 0: NVIDIA H100 (UUID: GPU-a)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n"
        "  MIG 3g.40gb+me  Device  1: (UUID: MIG-2)"
    )
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\ncase $1 in -L) echo '{listed}';; *) echo '0, GPU-a, NVIDIA H100, 81559, 80000';; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert find_gpus() == [("MIG 3g.40gb+me", 40 * 10**9, 40 * 10**9)]


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"SLURM_MEM_PER_NODE": ""}, None),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "64000"}, 64000 * 2**20),
        ({"SLURM_MEM_PER_NODE": "64G"}, 64 * 2**30),
        ({"SLURM_MEM_PER_CPU": "4096", "SLURM_CPUS_ON_NODE": "8"}, 2**35),
        ({"SLURM_MEM_PER_CPU": "4096"}, None),
        ({"SLURM_MEM_PER_GPU": "4096", "SLURM_GPUS_ON_NODE": "2"}, 2**33),
    ],
)
def test_memory_that_slurm_gave(
    environment: dict[str, str], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert hardware._find_slurm_bytes() == (size or hardware._UNLIMITED_BYTES)


@pytest.mark.parametrize("key", ["SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"])
def test_memory_that_slurm_would_not_give(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "lots")
    with pytest.raises(InputError, match=f"{key}=lots in the environment is not "):
        hardware._find_slurm_bytes()
