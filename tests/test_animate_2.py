"""Animate-2 through the command, against the goldens' videos."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_dist
from tests.conftest import golden_folder
from tests.forked import run_forked
from tests.gallery_folder import check_source
from wan_dist.run import main

GOLDEN = "wan2.2-animate-2"
CASES = ["guided", "release", "distilled_padded"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(case: str) -> list[str]:
    """Return the arguments of a run."""
    golden = golden_folder(GOLDEN)
    run = json.loads((golden / f"expected/{case}.json").read_text(encoding="utf-8"))
    width, height = run["size_wh"]
    return [
        *("task=animate-2-14B", f"ckpt_dir={golden_folder('wan2.1-i2v')}"),
        f"dit_file={golden / 'wan_animate_2/wan_animate_2_bf16.safetensors'}",
        f"src_video={golden / 'driving' / run['driving']}.mp4",
        f"src_ref={golden / 'driving' / run['driving']}.png",
        *(
            f"{key}={run[key]}"
            for key in ("prompt", "negative_prompt", "prompt_ref", "seed", "fps")
        ),
        *(f"first_frame_bias={run['log_scale']}", f"size={width}x{height}"),
        *(f"frame_num={run['clip_len']}", f"sample.steps={run['steps']}"),
        *(f"sample.shift={run['shift']}", f"sample.solver={run['solver']}"),
        f"sample.guide_scale={run['guide_scale']}",
        *("dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "output.name=out", "output.save_tensor=true"),
    ]


def compare(case: str, file: str = "out/out.safetensors") -> None:
    """Check a video, of which the golden has levels that were rounded down."""
    expected = load_file(golden_folder(GOLDEN) / f"expected/{case}.safetensors")["video_u8"]
    video = load_file(file)["video"].permute(1, 2, 3, 0)
    assert video.shape == expected.shape
    error = (video + 1) * 127.5 - expected
    print(error.min(), error.max())
    assert error.min() > -0.1
    assert error.max() < 1.1


@pytest.mark.parametrize("case", CASES)
def test_the_video_is_the_releases(case: str) -> None:
    settings = list_settings(case)
    assert main(settings) == 0
    compare(case)
    check_source(Path("out"), settings)


def make_release_folder(folder: Path) -> Path:
    """Make a folder as the release's, whose VAE is in a training checkpoint."""
    golden, image_to_video = golden_folder(GOLDEN), golden_folder("wan2.1-i2v")
    models = folder / "videomodel/Wan-AI"
    models.mkdir(parents=True)
    for name in ("wan_animate_2", "config.json"):
        (folder / name).symlink_to(golden / name)
    for file in image_to_video.glob("models_*.pth"):
        (models / file.name).symlink_to(file)
    (models / "umt5-xxl").symlink_to(image_to_video / "google/umt5-xxl")
    vae = torch.load(image_to_video / "Wan2.1_VAE.pth", weights_only=True)
    torch.save({"model_state": vae, "step": 7}, models / "vae.pth")
    return folder


def test_the_releases_folder_is_a_checkpoint(tmp_path: Path) -> None:
    settings = [s for s in list_settings("release") if not s.startswith("dit_file")]
    folder = make_release_folder(tmp_path / "Wan2.2-Animate-2-14B")
    assert main([*settings, f"ckpt_dir={folder}"]) == 0
    compare("release")


REFUSALS = [
    (["src_video=null"], "src_video is missing: animate-2-14B takes src_video=FILE src_ref=FILE"),
    (["src_ref=null"], "src_ref is missing: animate-2-14B takes"),
    (["src_pose=x.mp4"], "src_pose is given, but animate-2-14B takes src_video=FILE"),
    (["src_video=x.mp4"], "src_video=x.mp4: there is no such file"),
    (["frame_num=16"], "frame_num=16 is not 4n + 1"),
    (["frame_num=1"], "frame_num=1: clips of animate-2-14B have 5 or more"),
    (
        ["size=4x4"],
        "src_ref at size=4x4 would be 0x0; its sides differ too much, or size is too small",
    ),
    (["max_area=4096"], "max_area=4096: animate-2-14B takes size=WIDTHxHEIGHT as an area"),
    (["clips=2"], "clips=2: further clips start from one image, and animate-2-14B takes"),
    (["parallel.usp=xfuser"], "parallel.usp=xfuser cannot attend to a driving video"),
    (["replace_flag=true"], "replace_flag=true is for a driving video, and animate-2-14B takes"),
    (
        ["task=i2v-14B", "prompt_ref=null", "src_video=null", "src_ref=null", "first_frame_bias=1"],
        "first_frame_bias=1.0 is for animate-2-14B, and i2v-14B has no such input",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(
    settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*list_settings("guided"), *settings]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["0 1", "0 2", "decode 2"])
def test_a_stopped_run_resumes(moment: str, tmp_path: Path) -> None:
    """Also in the second clip, which is shorter than the first."""
    settings = [*list_settings("release"), f"output.dir={tmp_path / 'out'}"]
    stopped = run_forked("tests.preempted", moment, "0", *settings)
    assert stopped.returncode == 75, stopped.stderr
    resumed = run_forked("wan_dist.run", *settings)
    assert resumed.returncode == 0, resumed.stderr
    assert "continues from step" in resumed.stderr
    compare("release")


def test_streamed_and_sliced_blocks_are_the_resident_ones() -> None:
    for number, more in enumerate(
        (
            ["memory.dit=stream", "memory.slice_tokens=13"],
            ["memory.dit=disk", "memory.passes=apart"],
        )
    ):
        assert main([*list_settings("release"), *more, f"output.dir=out{number}"]) == 0
        compare("release", f"out{number}/out.safetensors")


def test_a_driving_video_is_encoded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*list_settings("guided"), f"cache.dir={tmp_path / 'cache'}"]
    assert main([*settings, "seed=1", "output.dir=other"]) == 0
    assert "image     read from the cache" not in capsys.readouterr().err
    assert main(settings) == 0
    assert "image     read from the cache" in capsys.readouterr().err
    compare("guided")


def test_from_python_the_video_is_the_commands() -> None:
    settings = dict(setting.split("=", 1) for setting in list_settings("release"))
    names = ("task", "ckpt_dir", "dit_file", "dtype", "device")
    models = {key: settings.pop(key) for key in names}
    texts = ("src_video", "src_ref", "prompt", "negative_prompt", "prompt_ref", "size")
    call = {
        key: value if key in texts or key == "sample.solver" else json.loads(value)
        for key, value in settings.items()
        if not key.startswith(("output", "cache"))
    }
    with wan_dist.open_pipeline(**models, cache={"dir": None}) as pipeline:
        video = pipeline(call.pop("prompt"), **call)
    expected = load_file(golden_folder(GOLDEN) / "expected/release.safetensors")["video_u8"]
    assert video.frames is not None
    assert video.frames.shape == expected.shape
    assert (torch.from_numpy(video.frames).int() - expected.int()).abs().max() <= 1
