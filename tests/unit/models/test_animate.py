"""Animate's models against the reference: motion and face of the driving video, and each step."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import golden_folder, relative_error
from tests.sampling import make_plain_solver
from wan_dist.models.build_transformer import build_transformer
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint, open_face_encoder

CPU = torch.device("cpu")
GOLDEN, TASK = "wan2.2-animate", TASKS["animate-14B"]
LAYOUTS = [GOLDEN, f"diffusers/{GOLDEN}"]


def read_case(name: str) -> dict[str, torch.Tensor]:
    return load_file(golden_folder(GOLDEN) / f"expected/{name}.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_motion_and_face_of_the_driving_video(layout: str) -> None:
    golden = read_case("guided")
    frames = load_file(golden_folder(GOLDEN) / "driving/frames.safetensors")["src_face"]
    mirrored = torch.cat([frames, frames[-3:-1].flip(0)])  # 15 to 17
    encoder = open_checkpoint(golden_folder(layout), TASK, torch.float32).face_encoder
    assert encoder is not None
    model = encoder.load(CPU)
    pixels = mirrored.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(
        model.encode_motion(pixels), golden["clip0.motion"], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(model(pixels), golden["clip0.face_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        model.encode_still_face(17), golden["uncond.face_features"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["animate", "animate_ref5", "guided", "replace"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_every_step_of_the_transformer(
    case: str, layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    checkpoint = open_checkpoint(golden_folder(layout), TASK, dtype)
    model = checkpoint.transformers[0].load(CPU)
    model.set_slice_tokens(13)
    golden = read_case(case)
    run = json.loads((golden_folder(GOLDEN) / f"expected/{case}.json").read_text(encoding="utf-8"))
    rotary = model.compute_rotary(golden["clip0.step0.latent"].unsqueeze(0))
    texts = [golden[key] for key in ("input.context", "input.context_null") if key in golden]
    projected = checkpoint.context_projections[0].load(CPU)(texts, golden["input.clip_fea"])
    timesteps = make_plain_solver(run["solver"], run["steps"], run["shift"]).timesteps
    is_guided = "clip0.step0.uncond" in golden
    assert is_guided == (case == "guided")
    for clip in range(run["num_clips"]):
        pose = torch.nn.functional.pad(golden[f"clip{clip}.pose_latents"], (0, 0, 0, 0, 1, 0))
        extra = torch.cat([golden[f"clip{clip}.y"], pose])
        faces = [golden[f"clip{clip}.face_features"]]
        faces += [golden["uncond.face_features"]] if is_guided else []
        contexts = [
            replace(context, face=face) for context, face in zip(projected, faces, strict=True)
        ]
        for step, timestep in enumerate(timesteps):
            latents = torch.cat([golden[f"clip{clip}.step{step}.latent"], extra]).unsqueeze(0)
            found = model(latents, torch.tensor([[timestep]]), contexts, rotary)
            for branch, velocity in zip(("cond", "uncond"), found, strict=False):
                expected = golden[f"clip{clip}.step{step}.{branch}"]
                assert relative_error(velocity[0], expected) < tolerance


def test_blocks_are_called_in_the_order_of_their_names() -> None:
    dims = open_checkpoint(golden_folder(GOLDEN), TASK, torch.float32).transformers[0].dims
    assert dims.block_names[:3] == ("blocks.0", "face_adapter.fuser_blocks.0", "blocks.1")
    assert len(dims.context_block_names) == 10
    with torch.device("meta"):
        model = build_transformer(dims, torch.float32)
    assert tuple(model.layers()) == dims.block_names
    assert len(list(model.self_attentions)) == 10


@pytest.fixture
def change_transformer(tmp_path: Path) -> Callable[..., Path]:
    def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for file in golden_folder(GOLDEN).iterdir():
            if file.name.startswith("diffusion_pytorch_model-"):
                tensors |= load_file(file)
            elif "index" not in file.name and file.name not in ("driving", "expected"):
                (folder / file.name).symlink_to(file)
        edit(tensors)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder

    return change


def test_blur_kernels_may_be_left_out(change_transformer: Callable[..., Path]) -> None:
    """As in ComfyUI's files."""

    def drop_kernels(tensors: dict[str, torch.Tensor]) -> None:
        kernels = [key for key in tensors if key.endswith(".kernel")]
        assert len(kernels) == 8
        for key in kernels:
            del tensors[key]

    checkpoint = open_checkpoint(change_transformer(drop_kernels), TASK, torch.float32)
    assert open_face_encoder(checkpoint.transformers[0]) is not None


def test_another_blur_kernel_is_refused(change_transformer: Callable[..., Path]) -> None:
    key = "motion_encoder.enc.net_app.convs.1.skip.0.kernel"

    def change_kernel(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].flip(0) + torch.eye(4)

    with pytest.raises(InputError, match=f"another kernel than .* in {key}"):
        open_checkpoint(change_transformer(change_kernel), TASK, torch.float32)
