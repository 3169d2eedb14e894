"""A run that received a signal continues where it stopped when the same command is given again, and
makes the same video to the bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import run_forked, run_ranks, run_torchrun
from tests.sampling import make_plain_solver
from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.parallel.mesh import Axis
from wan_dist.pipeline.resume import DenoisingProgress, ResumeState
from wan_dist.planning.digests import WeightsDigests
from wan_dist.planning.plan import make_plan
from wan_dist.run import main
from wan_dist.sampling.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
WEIGHTS = WeightsDigests("weights", "vae")
SETTINGS = [
    "task=toy",
    "frame_num=5",
    "size=64*64",
    "sample.steps=6",
    "output.name=clip",
    "cache.dir=null",
]


def start(num_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module as users start it, for what signals do to an interpreter and to torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        if num_ranks > 1
        else []
    )
    command = [sys.executable, "-W", "ignore", *launcher, "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def start_forked(_: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(module, *arguments)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_resumes_with_the_same_video(num_ranks: int, tmp_path: Path) -> None:
    whole, parted = (f"output.dir={tmp_path / name}" for name in ("whole", "parted"))
    run_ranks(num_ranks, "wan_dist.run", *SETTINGS, whole)
    moments = {
        "encode": "received SIGUSR1",
        "2": "after step 3 of 6",
        "decode": "received SIGUSR1",
    }
    for moment, said in list(moments.items())[
        num_ranks - 1 :
    ]:  # one rank that ends in encoding is for the others one that failed
        rank = "0" if moment == "decode" else str(num_ranks - 1)
        run = start if moment == "2" else run_torchrun if num_ranks > 1 else start_forked
        stopped = run(num_ranks, "tests.preempted", moment, rank, *SETTINGS, parted)
        assert stopped.returncode == (75 if num_ranks == 1 else 1)  # torchrun has codes of its own
        assert said in stopped.stderr, stopped.stderr[-2000:]
        assert not (tmp_path / "parted/clip.mp4").exists()
        assert len(list((tmp_path / "parted").glob("clip.*.state.safetensors"))) == (
            moment != "encode"
        )
    last, *_ = run_ranks(num_ranks, "wan_dist.run", *SETTINGS, parted)
    assert "resume    continues from step 6 of 6 (" in last.stderr
    assert (tmp_path / "parted/clip.mp4").read_bytes() == (tmp_path / "whole/clip.mp4").read_bytes()
    assert not list((tmp_path / "parted").glob("*.state.safetensors"))


def test_guessed_steps_resume_too(tmp_path: Path) -> None:
    settings = [
        "task=toy",
        "frame_num=5",
        "size=64*64",
        "sample.steps=14",
        "output.name=clip",
        "cache.steps=easy",
        "cache.threshold=9",
    ]
    whole, parted = (f"output.dir={tmp_path / name}" for name in ("whole", "parted"))
    assert main([*settings, whole]) == 0
    for moment in ("1", "6", "7"):
        stopped = run_forked("tests.preempted", moment, "0", *settings, parted)
        assert stopped.returncode == 75, stopped.stderr
    assert main([*settings, parted]) == 0
    assert json.loads((tmp_path / "whole/clip.json").read_text())["guessed_steps"] > 4
    assert (tmp_path / "parted/clip.mp4").read_bytes() == (tmp_path / "whole/clip.mp4").read_bytes()


def test_noise_between_steps_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = [
        *("task=toy", "frame_num=5", "size=64x64", "output.name=clip", "dtype=float32"),
        *("sample.solver=lcm", "sample.steps=5", "sample.guide_scale=1"),
    ]
    whole, parted = (f"output.dir={tmp_path / name}" for name in ("whole", "parted"))
    assert main([*settings, whole]) == 0
    for moment in ("1", "3"):
        stopped = run_forked("tests.preempted", moment, "0", *settings, parted)
        assert stopped.returncode == 75, stopped.stderr
    assert main([*settings, parted]) == 0
    assert (tmp_path / "parted/clip.mp4").read_bytes() == (tmp_path / "whole/clip.mp4").read_bytes()
    latents = [
        load_file(tmp_path / f"{name}/clip.latents.safetensors") for name in ("whole", "parted")
    ]
    assert torch.equal(latents[0]["latents"], latents[1]["latents"])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_done", [1, 2, 3, 5])
def test_a_solver_resumes(name: str, num_done: int) -> None:
    torch.manual_seed(0)
    velocities = torch.randn(4 if name.startswith("rcm") else 6, 1, 4, 2, 3, 3)
    num_done = min(num_done, len(velocities) - 1)
    through, before, after = (make_plain_solver(name, len(velocities), 5.0) for _ in range(3))
    latents = other = torch.randn(1, 4, 2, 3, 3)
    for index in range(len(velocities)):
        latents = through.step(index, latents, velocities[index])
        if index == num_done:
            after.restore(num_done, before.state())
        other = (before if index < num_done else after).step(index, other, velocities[index])
    assert torch.equal(latents, other)


def kept(folder: Path, *settings: str) -> ResumeState:
    config = compose_config(prepare_arguments(["task=toy", "prompt=a ball", *settings]))
    assert config is not None
    return ResumeState(folder, config, make_plan(config), WEIGHTS)


def test_progress_is_found_by_the_settings_that_matter(tmp_path: Path) -> None:
    progress = DenoisingProgress(3, torch.randn(4, 2, 3, 3), {"start": torch.randn(1, 4, 2, 3, 3)})
    assert kept(tmp_path, "seed=7").save_progress(progress)
    (file,) = tmp_path.glob("*.state.safetensors")
    again = kept(tmp_path, "seed=7", "memory.dit=stream", "parallel.timeout=60", "fps=8")
    plan = again.restore(Axis(), torch.device("cpu"))
    assert (again.progress.num_done, plan.seed) == (3, 7)
    assert again.progress.latents is not None
    assert torch.equal(again.progress.latents, progress.latents)  # type: ignore[arg-type]
    assert torch.equal(again.progress.solver_state["start"], progress.solver_state["start"])
    for setting in (
        "seed=8",
        "prompt=a cube",
        "sample.steps=9",
        "dtype=bfloat16",
        "sample.guide_scale=3",
        "output.name=other",
    ):
        other = kept(tmp_path, *(["seed=7"] if "seed" not in setting else []), setting)
        other.restore(Axis(), torch.device("cpu"))
        assert other.progress.num_done == 0, setting
    again.remove_file()
    assert not file.exists()
    again.remove_file()


def test_a_jobs_progress_is_found_without_scanning_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Path,
        "glob",
        lambda *_: pytest.fail("for each of 10,000 jobs among their files, that is quadratic"),
    )
    config = compose_config(prepare_arguments(["task=toy", "prompt=a ball", "output.name=a"]))
    assert config is not None
    first, second = (
        ResumeState(tmp_path, config, make_plan(config), WEIGHTS, is_job=True) for _ in range(2)
    )
    second.remove_file()
    assert first.save_progress(DenoisingProgress(2, torch.zeros(4, 2, 3, 3)))
    (file,) = (file for file in tmp_path.iterdir() if file.name.endswith(".state.safetensors"))
    second.restore(Axis(), torch.device("cpu"))
    assert second.progress.num_done == 2
    second.remove_file()
    assert not file.exists()


def test_a_drawn_seed_is_saved(tmp_path: Path) -> None:
    first = kept(tmp_path, "seed=-1")
    first.save_progress(DenoisingProgress(2, torch.zeros(4, 2, 3, 3)))
    second = kept(tmp_path, "seed=-1")
    plan = second.restore(Axis(), torch.device("cpu"))
    assert (plan.seed, plan.name) == (first.plan.seed, first.plan.name)
