"""The Python API: what it makes is what the command makes, on one rank and on several."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import wan_dist
from wan_dist.pipeline.rank_processes import PipelineError, PipelineProcesses
from wan_dist.run import main
from wan_dist.runtime.ffmpeg import read_packets

ROOT = Path(__file__).parents[1]
TOY: dict[str, Any] = {"dtype": "float32", "device": "cpu", "cache": {"dir": None}}
VIDEO: dict[str, Any] = {"seed": 7, "size": "64*48", "frame_num": 9, "sample": {"steps": 3}}


@pytest.fixture(scope="module")
def pipeline() -> Iterator[wan_dist.VideoPipeline]:
    opened = wan_dist.open_pipeline("toy", **TOY)
    assert isinstance(opened, wan_dist.VideoPipeline)
    with opened:
        yield opened


@pytest.fixture(scope="module")
def processes() -> Iterator[PipelineProcesses]:
    opened = wan_dist.open_pipeline("toy", gpus=2, **TOY)
    assert isinstance(opened, PipelineProcesses)
    with opened:
        yield opened


def test_the_import_is_light() -> None:
    program = (
        "import sys, time; start = time.process_time(); import wan_dist; wan_dist.InputError; "
        "assert time.process_time() - start < 0.1; assert not {'torch', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_call_makes_the_commands_video(pipeline: wan_dist.VideoPipeline, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    image.save(tmp_path / "first.png")
    settings = [f"output.dir={tmp_path}", "output.name=video", "output.save_tensor=true"]
    settings += ["task=toy", "dtype=float32", "device=cpu", "cache.dir=null", "prompt=a red ball"]
    settings += ["seed=7", "size=64*48", "frame_num=9", "sample.steps=3"]
    assert main([*settings, f"image={tmp_path / 'first.png'}"]) == 0
    expected = load_file(tmp_path / "video.safetensors")["video"].permute(1, 2, 3, 0)
    video = pipeline("a red ball", image=image, **VIDEO)
    assert video.frames is not None
    assert video.frames.shape == (9, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    difference = np.abs(video.frames - (expected.numpy() + 1) * 127.5).max()
    assert difference <= 0.5 + 1e-3  # rounding alone
    latents = load_file(tmp_path / "video.latents.safetensors")["latents"]
    assert (video.latents - latents).abs().max() == 0
    assert video.record.seed == 7
    assert {"denoise", "decode"} <= set(video.record.stages)


def test_models_stay_loaded_and_know_other_timesteps(pipeline: wan_dist.VideoPipeline) -> None:
    pipeline("a red ball", **VIDEO)
    again = pipeline("a red ball", **VIDEO | {"sample": {"steps": 5, "shift": 2.0}})
    assert "load" not in again.record.stages
    with wan_dist.open_pipeline("toy", **TOY) as other:
        alone = other("a red ball", **VIDEO | {"sample": {"steps": 5, "shift": 2.0}})
    assert "load" in alone.record.stages
    assert (again.latents - alone.latents).abs().max() == 0


def test_a_folder_gets_the_files_and_resumes(
    pipeline: wan_dist.VideoPipeline, tmp_path: Path
) -> None:
    first = pipeline("a red ball", output={"dir": tmp_path}, **VIDEO)
    (file,) = tmp_path.glob("*.mp4")
    assert file.with_suffix(".json").exists()
    file.with_suffix(".json").unlink()  # as if it had been killed before the end
    file.unlink()
    second = pipeline("a red ball", output={"dir": tmp_path}, **VIDEO)
    assert "denoise" not in second.record.stages
    assert (first.latents - second.latents).abs().max() == 0


def test_frames_are_those_of_any_format(pipeline: wan_dist.VideoPipeline, tmp_path: Path) -> None:
    frames = pipeline("a red ball", **VIDEO).frames
    video = pipeline("a red ball", output={"dir": tmp_path, "video": "ffv1"}, **VIDEO)
    assert frames is not None
    assert video.frames is not None
    assert video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, frames)
    (file,) = tmp_path.glob("*.mkv")
    assert len(read_packets(file).intervals) == len(frames)


@pytest.mark.parametrize("writes_output", [True, False])
def test_clips_are_the_commands(
    writes_output: bool, pipeline: wan_dist.VideoPipeline, tmp_path: Path
) -> None:
    settings = [f"output.dir={tmp_path}", "output.name=video", "output.save_tensor=true"]
    settings += ["task=toy", "dtype=float32", "device=cpu", "cache.dir=null", "prompt=a red ball"]
    settings += ["seed=7", "size=64*48", "frame_num=9", "sample.steps=3", "clips=3"]
    settings += ["output.metadata=false"]  # the names differ
    assert main(settings) == 0
    expected = load_file(tmp_path / "video.safetensors")["video"].permute(1, 2, 3, 0)
    file_settings = {"dir": tmp_path / "called", "metadata": False}
    output = {"output": file_settings} if writes_output else {}
    video = pipeline("a red ball", clips=3, **output, **VIDEO)
    assert video.frames is not None
    assert video.frames.shape == (25, 48, 64, 3)
    difference = np.abs(video.frames - (expected.numpy() + 1) * 127.5).max()
    assert difference <= 0.5 + 1e-3  # rounding alone
    names = ("video", "video.clip2", "video.clip3")
    latents = [load_file(tmp_path / f"{name}.latents.safetensors")["latents"] for name in names]
    assert torch.equal(video.latents, torch.cat(latents, dim=1))
    assert (video.record.num_clips, video.record.num_frames) == (3, 25)
    assert {"denoise", "denoise clip3"} <= set(video.record.stages)
    video.save(tmp_path / "saved.mp4")
    files = [tmp_path / "saved.mp4", *(tmp_path / "called").glob("*.mp4")]
    assert len(files) == 1 + writes_output
    for file in files:
        assert file.read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_a_video_is_saved(pipeline: wan_dist.VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a red ball", **VIDEO)
    video.save(tmp_path / "new" / "video.mp4")
    assert (tmp_path / "new" / "video.mp4").stat().st_size > 1000
    for name, told in {"video.gif": "saved as .mp4", "video.png": "has 9 frames"}.items():
        with pytest.raises(wan_dist.InputError, match=told):
            video.save(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant": "fp8"}, "quant applies to the whole pipeline"),
        ({"parallel": {"cfg": 2}}, "parallel.cfg applies to the whole pipeline"),
        ({"jobs": "a.txt"}, "jobs applies to the whole pipeline"),
        ({"clips": 2, "frame_num": 1}, "clips=2: further clips repeat one frame"),
        ({"frame_num": 8}, "frame_num=8 is not 4n"),
        ({"steps": 8}, "did you mean 'sample.steps'"),
        ({"sample": {"steps": "many"}}, "many"),
        ({"image": "missing.png"}, "missing.png"),
    ],
)
def test_a_setting_that_does_not_work_is_named(
    settings: dict[str, Any], told: str, pipeline: wan_dist.VideoPipeline
) -> None:
    with pytest.raises(wan_dist.InputError, match=told):
        pipeline("a red ball", **VIDEO | settings)


@pytest.mark.parametrize(
    ("task", "settings", "told"),
    [
        ("t2v", {}, "did you mean"),
        ("toy", {"jobs": "a.txt"}, "jobs is for the command line"),
        ("toy", {"gpus": 0}, "gpus=0"),
        ("toy", {"quants": "fp8"}, "did you mean 'quant'"),
        ("t2v-1.3B", {"ckpt_dir": "missing"}, "missing is not a folder"),
    ],
)
def test_what_cannot_be_opened_is_named(task: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(wan_dist.InputError, match=told):
        wan_dist.open_pipeline(task, **settings)


def test_what_is_to_come_is_told(pipeline: wan_dist.VideoPipeline) -> None:
    plan = pipeline.plan(size="64*48", frame_num=9)
    assert (plan.width, plan.height, plan.frame_num) == (64, 48, 9)
    assert {stage.name for stage in plan.stage_memories} >= {"denoise", "decode"}


def test_processes_make_the_same_video(
    processes: PipelineProcesses, pipeline: wan_dist.VideoPipeline
) -> None:
    alone, together = pipeline("a red ball", **VIDEO), processes("a red ball", **VIDEO)
    assert (alone.latents - together.latents).abs().max() < 1e-4
    assert together.record.degrees["cfg"] == 2
    clips = [opened("a red ball", clips=2, **VIDEO) for opened in (pipeline, processes)]
    assert clips[1].frames.shape == (17, 48, 64, 3)
    assert (clips[0].latents - clips[1].latents).abs().max() < 1e-4
    with pytest.raises(wan_dist.InputError, match="frame_num=8 is not 4n"):
        processes("a red ball", frame_num=8)
    again = processes("a red ball", **VIDEO)
    assert (again.latents - together.latents).abs().max() == 0


def test_a_process_that_is_killed_ends_the_pipeline(processes: PipelineProcesses) -> None:
    pids = [process.pid for process in processes._processes]
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PipelineError, match=r"rank 1 ended with exit code -9|is closed"):
        processes("a red ball", **VIDEO)
    assert time.monotonic() - start < 60
    with pytest.raises(PipelineError, match="is closed"):
        processes("a red ball", **VIDEO)


def test_the_example_runs_on_several_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", "docs/examples/generate.py", str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "(17, 64, 64, 3) uint8 (16, 5, 8, 8)" in done.stdout
    assert {file.name for file in tmp_path.glob("*.mp4")} == {
        *("circle.mp4", "star-1.mp4", "star-2.mp4")
    }
