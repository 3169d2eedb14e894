"""What goes wrong on one rank alone while all work together: the run goes on or ends, on all ranks,
within seconds.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.ranks.tables import run_workers

TIMES = 10.0
"""A run ends within this many times what it takes undisturbed, from a fault on; a collective would wait for
parallel.timeout, which is much more.
"""
TOY = [
    "task=toy",
    "dtype=float32",
    "size=64*64",
    "frame_num=17",
    "sample.steps=4",
    "cache.dir=null",
    "parallel.timeout=600",
]
ONE = [*TOY, "prompt=a red circle", "output.name=out", "output.save_tensor=true"]


def fault(rank: int, place: str, kind: str, call: int) -> dict[str, Any]:
    return {"rank": rank, "place": place, "kind": kind, "call": call}


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """Run all rows, with gloo or NCCL; returns their folder, each rank's exit code, seconds
    after the fault and seconds in all, and what was said.
    """
    folder = tmp_path_factory.mktemp(f"faults-{request.param}")
    Image.new("RGB", (64, 64), "blue").save(folder / "image.png")
    (folder / "jobs.txt").write_text("a red circle\na blue star\na green square\n")
    image = f"image={folder / 'image.png'}"
    jobs = [*TOY, f"jobs={folder / 'jobs.txt'}", "parallel.dp=1"]
    rows: dict[str, tuple[list[str], dict[str, Any] | None]] = {
        "plain": (ONE, None),
        "decode, rank 1": (ONE, fault(1, "decode", "memory", 2)),
        "decode, rank 0": (ONE, fault(0, "decode", "memory", 2)),
        "denoise, rank 1": (ONE, fault(1, "denoise", "memory", 3)),
        "denoise sharded": (
            [*ONE, "parallel.ulysses=2", "fsdp.dit=true"],
            fault(0, "denoise", "memory", 3),
        ),
        "image": ([*ONE, image], None),
        "encode, rank 1": ([*ONE, image], fault(1, "encode", "memory", 1)),
        "error in denoising": (ONE, fault(1, "denoise", "error", 3)),
        "error in a batch": (jobs, fault(1, "decode", "error", 4)),
    }
    rows["again"] = (
        [*ONE, f"output.dir={folder / 'error in denoising'}"],
        None,
    )  # the same command as before
    device = f"device={request.param}"
    table = [
        [[device, f"output.dir={folder / name}", *arguments], what]
        for name, (arguments, what) in rows.items()
    ]
    told = run_workers("tests.ranks.faulty_worker", table, 2, folder)
    found = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(2)]
    return folder, dict(zip(rows, zip(*found, strict=True), strict=True)), told


def video(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / name / "out.safetensors")["video"]


def check_end_time(ends: dict[str, Any], name: str) -> None:
    undisturbed = max(seconds for _, _, seconds in ends["plain"])
    assert 0 < max(seconds for _, seconds, _ in ends[name]) < TIMES * undisturbed


@pytest.mark.parametrize(
    "name",
    ["decode, rank 1", "decode, rank 0", "denoise, rank 1", "denoise sharded", "encode, rank 1"],
)
def test_all_take_less_where_one_runs_out_of_memory(name: str, outcomes: Any) -> None:
    folder, ends, told = outcomes
    assert [code for code, *_ in ends[name]] == [0, 0], told
    check_end_time(ends, name)
    undisturbed = video(folder, "image" if name.startswith("encode") else "plain")
    assert (video(folder, name) - undisturbed).abs().max() < 1e-3
    assert not list((folder / name).glob("*.state.safetensors"))


def test_an_error_of_one_rank_ends_the_run_and_keeps_its_steps(outcomes: Any) -> None:
    folder, ends, told = outcomes
    assert [code for code, *_ in ends["error in denoising"]] == [1, 1], told
    check_end_time(ends, "error in denoising")
    assert told.count("wan_dist: error: RuntimeError: as of cuDNN, on this rank alone") == 1
    assert [code for code, *_ in ends["again"]] == [0, 0], told
    assert "resume    continues from step 2 of " in told
    assert (video(folder, "error in denoising") - video(folder, "plain")).abs().max() < 1e-5


def test_an_error_of_one_rank_fails_its_job_alone(outcomes: Any) -> None:
    folder, ends, told = outcomes
    assert [code for code, *_ in ends["error in a batch"]] == [1, 0], told
    check_end_time(ends, "error in a batch")
    records = [
        json.loads(file.read_text()) for file in (folder / "error in a batch").glob("*.json")
    ]
    assert sorted(record["status"] for record in records) == ["done", "done", "failed"]
    (failed,) = (record for record in records if record["status"] == "failed")
    assert "RuntimeError: as of cuDNN, on this rank alone (rank 1 on " in failed["error"]
