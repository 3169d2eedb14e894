"""First and last frame with the image-to-video weights of A14B, against diffusers' pipeline with the
reference's solver.
"""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import golden_folder, relative_error
from wan_dist.planning.plan import make_plan
from wan_dist.run import main
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

GOLDEN = "wan2.2-flf2v-a14b"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(case: str, checkpoint: Path) -> list[str]:
    folder = golden_folder(GOLDEN)
    run = json.loads((folder / f"expected/{case}.json").read_text(encoding="utf-8"))
    width, height = run["size"]
    low, high = run["guide_scale_low_high"]
    return [
        *("task=i2v-A14B", f"ckpt_dir={checkpoint}", f"prompt={run['prompt']}"),
        f"negative_prompt={run['negative_prompt']}",
        *(f"{key}_frame={folder / run[key]}" for key in ("first", "last")),
        *(f"size={width}x{height}", f"frame_num={run['frame_num']}", f"seed={run['seed']}"),
        *(f"sample.steps={run['steps']}", f"sample.shift={run['shift']}"),
        *(f"sample.guide_scale=[{low},{high}]", "dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "output.name=out", "output.save_tensor=true"),
    ]


@pytest.mark.parametrize("layout", [GOLDEN, "wan2.2-i2v-a14b"])
@pytest.mark.parametrize("case", ["unipc", "frames5_shift3"])
def test_the_video_is_that_of_diffusers(case: str, layout: str) -> None:
    expected = load_file(golden_folder(GOLDEN) / f"expected/{case}.safetensors")
    assert main(list_settings(case, golden_folder(layout))) == 0
    latents = load_file("out/out.latents.safetensors")["latents"]
    final = expected["final_latent"].view_as(latents)
    print(relative_error(latents, final))
    assert relative_error(latents, final) < 1e-3
    if "video" in expected:
        video = load_file("out/out.safetensors")["video"]
        assert relative_error(video, expected["video"].view_as(video).clamp(-1, 1)) < 1e-3


def test_without_the_last_frame_it_is_another_video() -> None:
    settings = list_settings("frames5_shift3", golden_folder(GOLDEN))
    expected = load_file(golden_folder(GOLDEN) / "expected/frames5_shift3.safetensors")
    alone = [
        setting.replace("first_frame=", "image=")
        for setting in settings
        if not setting.startswith("last_frame=")
    ]
    assert main(alone) == 0
    latents = load_file("out/out.latents.safetensors")["latents"]
    assert relative_error(latents, expected["final_latent"].view_as(latents)) > 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["image", "last_frame"], "takes image=FILE, or first_frame=FILE last_frame=FILE"),
        (["image", "first_frame", "last_frame"], "image and first_frame and last_frame are given"),
        (["first_frame"], "last_frame is missing: i2v-A14B takes"),
        (["last_frame"], "first_frame is missing: i2v-A14B takes"),
        ([], "image is missing: i2v-A14B takes image=FILE, or first_frame=FILE"),
        (["first_frame", "last_frame", "clips=2"], "clips=2: further clips start from one image"),
        (["first_frame", "last_frame", "frame_num=1"], "frame_num=1 must be at least 5"),
    ],
)
def test_images_that_do_not_belong_together(given: list[str], message: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    settings = [entry if "=" in entry else f"{entry}={tmp_path / 'a.png'}" for entry in given]
    config = read_config(["task=i2v-A14B", "prompt=x", *settings])
    assert config is not None
    with pytest.raises(InputError, match=message):
        make_plan(config, ranks=(1, 1))


def test_a_last_frame_of_another_shape_is_cut(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    Image.new("RGB", (120, 60)).save(tmp_path / "b.png")
    config = read_config(
        [
            "task=i2v-A14B",
            "prompt=x",
            f"first_frame={tmp_path / 'a.png'}",
            f"last_frame={tmp_path / 'b.png'}",
        ]
    )
    assert config is not None
    assert [image.size for image in make_plan(config, ranks=(1, 1)).images] == [(64, 48)] * 2
