"""VACE against the reference: what its reading makes of files, and whole runs through the command."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, golden_folder, relative_error
from tests.forked import run_forked
from tests.gallery_folder import check_source
from wan_dist.config.loras import LoraSetting
from wan_dist.models.vae.model import split_frames_into_chunks
from wan_dist.pipeline.conditioning.encoders import convert_image_to_tensor
from wan_dist.pipeline.conditioning.vace import (
    build_vace_context,
    fit_on_white,
    iterate_masks,
    iterate_resized_frames,
    read_mask_channels,
)
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.run import main
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.run_config import read_config
from wan_dist.weights.checkpoint import open_checkpoint

FILES = "wan2.1-vace-files"
CASES = ["video_mask_refs", "video_ref", "refs_only"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(case: str, checkpoint: Path, folder: Path) -> list[str]:
    """Return the arguments of a run; its references have no alpha, as the reference drops it."""
    inputs = golden_folder(FILES)
    run = json.loads((inputs / f"expected/{case}.json").read_text(encoding="utf-8"))
    references = []
    folder.mkdir(exist_ok=True)
    for name in run["src_ref_images"].split(","):
        references.append(folder / Path(name).name)
        Image.open(inputs / name).convert("RGB").save(references[-1])
    videos = [f"{key}={inputs / run[key]}" for key in ("src_video", "src_mask") if run.get(key)]
    width, height = run["size_wh"]
    return [
        *("task=vace-14B", f"ckpt_dir={checkpoint}", f"prompt={run['prompt']}", *videos),
        f"src_ref_images={','.join(map(str, references))}",
        f"negative_prompt={run['negative_prompt']}",
        *(f"size={width}x{height}", f"frame_num={run['frame_num']}", f"seed={run['seed']}"),
        *(f"sample.steps={run['steps']}", f"sample.shift={run['shift']}"),
        f"sample.solver={run['solver']}",
        *(f"sample.guide_scale={run['guide_scale']}", f"context_scale={run['context_scale']}"),
        *("dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "output.name=out", "output.save_tensor=true"),
    ]


def make_case_plan(case: str, folder: Path) -> VideoPlan:
    config = read_config(list_settings(case, golden_folder("wan2.1-vace"), folder))
    assert config is not None
    return make_plan(config, ranks=(1, 1))


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_from_files_is_the_references_own(case: str, tmp_path: Path) -> None:
    """Frames and pixels exactly."""
    expected = load_file(golden_folder(FILES) / f"expected/{case}.safetensors")
    plan = make_case_plan(case, tmp_path)
    assert (plan.frame_num, plan.height, plan.width) == expected["video"].shape[1:]
    size = (plan.width, plan.height)
    for index, image in enumerate(plan.images):
        fitted = fit_on_white(convert_image_to_tensor(image), size)
        assert torch.equal(fitted, expected[f"ref_image_{index}"].squeeze(1))
    if plan.source is None:
        assert "src_video_u8" not in expected
        return
    assert list(plan.source.frame_indices) == expected["frame_ids"].tolist()
    frames = iterate_resized_frames(plan.source.video, plan.source.frame_indices, size)
    assert torch.equal(torch.stack(list(frames), dim=1), expected["src_video_u8"])
    masks = torch.stack(list(iterate_masks(plan.source, size)), dim=1)
    whole = torch.full_like(masks, 255).byte()
    assert torch.equal((masks * 255).round().byte(), expected.get("src_mask_u8", whole))
    channels = expected["input.vace_context"][32:, len(plan.images) :]
    torch.testing.assert_close(read_mask_channels(plan)[0], channels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["mask", "mask_ref"])
def test_the_context_of_given_tensors(case: str) -> None:
    folder = golden_folder("wan2.1-vace")
    golden = load_file(folder / f"expected/{case}.safetensors")
    vae = open_checkpoint(folder, TASKS["vace-14B"], torch.float32).vae.load(torch.device("cpu"))
    video, mask = golden["src_video"].unsqueeze(0), golden["src_mask"][:1].unsqueeze(0)
    is_generated = mask > 0.5
    inactive, reactive = (
        vae.encode(split_frames_into_chunks(video * part)) for part in (~is_generated, is_generated)
    )
    references = [vae.encode([golden["ref_image"][None]])] if "ref_image" in golden else []
    expected = golden["input.vace_context"][None]
    channels = expected[:, 32:, len(references) :]
    context = build_vace_context(references, inactive, reactive, channels)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["wan2.1-vace", "diffusers/wan2.1-vace"])
@pytest.mark.parametrize("case", CASES)
def test_the_video_is_the_references(case: str, layout: str, tmp_path: Path) -> None:
    expected = load_file(golden_folder(FILES) / f"expected/{case}.safetensors")
    settings = list_settings(case, golden_folder(layout), tmp_path)
    assert main(settings) == 0
    video = load_file("out/out.safetensors")["video"]
    print((video - expected["video"]).abs().max())
    torch.testing.assert_close(video, expected["video"], rtol=0, atol=1e-3)
    check_source(Path("out"), settings)


@pytest.fixture
def with_experts(tmp_path: Path) -> Path:
    """Return a checkpoint with two experts, which are both the transformer of the goldens."""
    golden, folder = golden_folder("wan2.1-vace"), tmp_path / "experts"
    folder.mkdir()
    for name in ("high_noise_model", "low_noise_model"):
        (folder / name).mkdir()
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            (folder / name / file).symlink_to(golden / file)
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google"):
        (folder / name).symlink_to(golden / name)
    return folder


def test_two_experts(with_experts: Path, tmp_path: Path) -> None:
    """The same weights for high and low noise give the video of one transformer."""
    settings = list_settings("video_ref", golden_folder("wan2.1-vace"), tmp_path)
    settings.append("sample.shift=1")  # else all steps are of the first one
    assert main(settings) == 0
    more = ["task=vace-A14B", f"ckpt_dir={with_experts}", "output.dir=two"]
    assert main([*settings, *more]) == 0
    stages = json.loads(Path("two/out.json").read_text(encoding="utf-8"))["stages"]
    assert {"load high", "load low"} < set(stages)
    videos = [load_file(f"{folder}/out.safetensors")["video"] for folder in ("out", "two")]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)


@pytest.mark.parametrize("moment", ["1", "decode"])
def test_a_stopped_run_resumes(moment: str, tmp_path: Path) -> None:
    expected = load_file(golden_folder(FILES) / "expected/refs_only.safetensors")
    settings = list_settings("refs_only", golden_folder("wan2.1-vace"), tmp_path)
    settings.append(f"output.dir={tmp_path / 'out'}")
    stopped = run_forked("tests.preempted", moment, "0", *settings)
    assert stopped.returncode == 75, stopped.stderr
    assert not Path("out/out.mp4").exists()
    resumed = run_forked("wan_dist.run", *settings)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continues from step {2 if moment == '1' else 3} of 3" in resumed.stderr
    video = load_file("out/out.safetensors")["video"]
    torch.testing.assert_close(video, expected["video"], rtol=0, atol=1e-3)
    assert load_file("out/out.latents.safetensors")["latents"].shape[1] == 3


def test_jobs_name_their_files_beside_the_list(tmp_path: Path) -> None:
    """Also lists of images; what is encoded is kept, and another strength is another video."""
    settings = list_settings("video_ref", golden_folder("wan2.1-vace"), tmp_path / "images")
    given = dict(setting.split("=", 1) for setting in settings)
    folder = tmp_path / "list"
    folder.mkdir()
    for key, name in (("src_video", "a.mp4"), ("src_ref_images", "b, c.png")):
        (folder / name).symlink_to(given.pop(key))
    job = {"src_video": "a.mp4", "src_ref_images": ["b, c.png"], "prompt": given.pop("prompt")}
    lines = [job | {"name": "same"}, job | {"name": "weak", "context_scale": 0.1}]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = [
        f"{key}={value}"
        for key, value in given.items()
        if key not in ("output.name", "cache.dir", "seed")
    ]
    arguments += [f"jobs={folder / 'jobs.jsonl'}", f"seed={given['seed']}", "cache.dir=cache"]
    assert main(arguments) == 0
    expected = load_file(golden_folder(FILES) / "expected/video_ref.safetensors")["video"]
    videos = {name: load_file(f"out/{name}.safetensors")["video"] for name in ("same", "weak")}
    torch.testing.assert_close(videos["same"], expected, rtol=0, atol=1e-3)
    assert relative_error(videos["weak"], expected) > 0.01
    records = [json.loads(Path(f"out/{name}.json").read_text(encoding="utf-8")) for name in videos]
    assert [("image" in record["stages"]) for record in records] == [True, False]


def test_loras_reach_the_side_branch(tmp_path: Path) -> None:
    folder, cpu = golden_folder("wan2.1-vace"), torch.device("cpu")
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(4, 64, generator=generator) for _ in range(2))
    tensors = {
        "diffusion_model.vace_blocks.1.self_attn.k.lora_A.weight": down,
        "diffusion_model.vace_blocks.1.self_attn.k.lora_B.weight": up.T.contiguous(),
        "diffusion_model.vace_blocks.0.after_proj.lora_A.weight": down.clone(),
        "diffusion_model.vace_blocks.0.after_proj.lora_B.weight": up.T.contiguous(),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = LoraSetting("lora", tmp_path / "lora.safetensors", 0.5, None)
    task = TASKS["vace-14B"]
    plain, merged = (
        open_checkpoint(folder, task, torch.float32, loras=loras).transformers[0].load(cpu)
        for loras in ([], [lora])
    )
    expected = 0.5 * up.T @ down
    for name, rows in (("1.self_attn.qkv", slice(64, 128)), ("0.after_proj", slice(0, 64))):
        weights = [
            model.get_parameter(f"vace_blocks.{name}.weight")[rows] for model in (plain, merged)
        ]
        torch.testing.assert_close(weights[1] - weights[0], expected, rtol=0, atol=1e-6)


def test_quantised_and_streamed_blocks_are_the_resident_ones(tmp_path: Path) -> None:
    settings = list_settings("refs_only", golden_folder("wan2.1-vace"), tmp_path)
    videos = []
    for more in (["quant=int8"], ["quant=int8", "memory.dit=stream", "memory.slice_tokens=17"]):
        folder = f"out{len(videos)}"
        assert main([*settings, *more, f"output.dir={folder}"]) == 0
        videos.append(load_file(f"{folder}/out.safetensors")["video"])
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)
    whole = load_file(golden_folder(FILES) / "expected/refs_only.safetensors")["video"]
    assert 1e-3 < relative_error(videos[0], whole) < 0.2


def test_a_single_file_is_told_from_that_of_text_to_video(tmp_path: Path) -> None:
    """With a prefix as ComfyUI's; the layers come from the folder's config, evenly spaced ones without."""
    golden = golden_folder("wan2.1-vace")
    tensors = load_file(golden / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "vace.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in tensors.items()}, file)
    given = {"dit_file": [file]}
    checkpoint = open_checkpoint(golden, TASKS["vace-14B"], torch.float32, given_files=given)
    assert checkpoint.transformers[0].dims.vace_layers == (0, 2)
    with pytest.raises(
        InputError, match=r"not a t2v-14B checkpoint: .* has 96 VACE channels, not 0"
    ):
        open_checkpoint(golden, TASKS["t2v-14B"], torch.float32, given_files=given)
    with pytest.raises(InputError, match="has 0 VACE channels, not 96"):
        open_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["vace-14B"], torch.float32)
