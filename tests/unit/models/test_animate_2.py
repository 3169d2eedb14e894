"""Animate-2's attention and transformer against the goldens: its driving pass, and each step."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import golden_folder, relative_error
from tests.sampling import make_plain_solver
from wan_dist.config.loras import LoraSetting
from wan_dist.models.animate_2 import SKIPPED_LAYER, record_driving
from wan_dist.models.attention.driving import DrivenAttention, DrivingLayout, DrivingStream
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.rotary import apply_rotary, compute_rotary_tables
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.parallel.driving import apply_driving
from wan_dist.parallel.mesh import Axis
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
GOLDEN = "wan2.2-animate-2"
CASES = ["guided", "distilled", "chained", "release", "distilled_padded"]
ALONE = Axis(0, 1)


def read_case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = golden_folder(GOLDEN) / "expected"
    facts = {}
    if (file := folder / f"{name}.json").exists():
        facts = json.loads(file.read_text(encoding="utf-8"))
    return load_file(folder / f"{name}.safetensors"), facts


@pytest.mark.parametrize("case", ["plain", "bias", "padded"])
def test_two_attentions_are_the_masked_one(case: str) -> None:
    golden, _ = read_case("attention")
    golden = {
        key.removeprefix(f"{case}."): value.float() if value.is_floating_point() else value
        for key, value in golden.items()
        if key.startswith(f"{case}.")
    }
    num_frames, frame_tokens, driving_tokens, num_slots, slot_tokens = golden["shape"].tolist()
    layout = DrivingLayout(
        num_frames,
        frame_tokens,
        driving_tokens,
        first_frame_bias=0.0 if case == "plain" else golden["log_scale"].item(),
        slot_tokens=slot_tokens if case == "padded" else None,
        num_slots=num_slots,
    )
    zero_keys = torch.tensor([layout.count_zero_keys(frame) for frame in range(num_frames)])
    torch.testing.assert_close(zero_keys.repeat_interleave(frame_tokens), golden["zero_keys"])
    stream = DrivingStream()
    stream.layout = layout
    attention = DrivenAttention(InnerAttention(), stream, 0)
    stream.kept[0] = golden["k_driving"][None], golden["v_driving"][None]
    out = attention(*(golden[name][None] for name in ("q", "k", "v")))
    torch.testing.assert_close(out[0], golden["out"], rtol=0, atol=2e-6)


def open_golden(weights: str, loras: Sequence[LoraSetting] = ()) -> Checkpoint:
    given = {}
    if weights == "wan_animate_2":
        file = golden_folder(GOLDEN) / "wan_animate_2/wan_animate_2_bf16.safetensors"
        given = {"dit_file": [file]}
    return open_checkpoint(
        golden_folder("wan2.1-i2v"),
        TASKS["animate-2-14B"],
        torch.float32,
        given_files=given,
        loras=loras,
    )


def make_layout(facts: dict[str, Any], y: Tensor, driving: Tensor) -> DrivingLayout:
    is_release = facts["rules"] == "release"
    width, height = facts["size_wh"]
    return DrivingLayout(
        y.shape[1],
        y.shape[2] * y.shape[3] // 4,
        driving.shape[2] * driving.shape[3] // 4,
        first_frame_bias=facts["log_scale"],
        slot_tokens=width * height // 256 if is_release else None,
        num_slots=(facts["clip_len"] - 1) // 4 + 2,
    )


def check_kept(
    model: FusedTransformer, golden: dict[str, Tensor], clip: int, driving: Tensor, columns: int
) -> None:
    """Check the driving keys, which are kept rotated, and values of the layers in the golden."""
    grid = driving.shape[1], driving.shape[2] // 2, driving.shape[3] // 2
    rotary = compute_rotary_tables(grid, model.dims.head_dim, device=CPU, offset=(1, 0, columns))
    num_checked = 0
    assert model.driving is not None
    assert len(model.driving.kept) == model.dims.num_layers
    for layer, (keys, values) in model.driving.kept.items():
        if (expected_keys := golden.get(f"clip{clip}.k.layer{layer}")) is None:
            continue
        assert relative_error(keys, apply_rotary(expected_keys[None], rotary)) < 1e-5
        assert relative_error(values, golden[f"clip{clip}.v.layer{layer}"][None]) < 1e-5
        num_checked += 1
    assert num_checked == len([key for key in golden if key.startswith(f"clip{clip}.k.")])


@pytest.mark.parametrize("slice_tokens", [None, 13])
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_the_transformer(case: str, slice_tokens: int | None) -> None:
    golden, facts = read_case(case)
    checkpoint = open_golden(facts["weights"])
    model = checkpoint.transformers[0].load(CPU)
    model.set_slice_tokens(slice_tokens)
    projection = checkpoint.context_projections[0].load(CPU)
    apply_driving(model, ALONE, ALONE, ulysses_size=1)
    assert model.driving is not None
    branches = {"cond": "input.context"}
    if facts["guide_scale"] > 1:
        branches["uncond"] = "input.context_null"
    texts = [golden[key] for key in branches.values()]
    contexts = projection(texts, golden["input.clip_fea"])
    contexts[1:] = [replace(context, skipped_layer=SKIPPED_LAYER) for context in contexts[1:]]
    timesteps = make_plain_solver(facts["solver"], facts["steps"], facts["shift"]).timesteps
    assert (case == "distilled_padded") != any(".k.layer" in key for key in golden)
    clip = 0
    while f"clip{clip}.y" in golden:
        y, driving = golden[f"clip{clip}.y"], golden[f"clip{clip}.driving_latents"]
        model.driving.layout = make_layout(facts, y, driving)
        # In diffusers that of the first clip is for all.
        features = golden.get(f"clip{clip}.clip_fea_ref", golden["clip0.clip_fea_ref"])
        [driving_context] = projection([golden["input.context_ref"]], features)
        columns = y.shape[3] // 2
        record_driving(model, driving[None], driving_context, first_column=columns)
        check_kept(model, golden, clip, driving, columns)
        rotary = model.compute_rotary(y[None])
        for step, timestep in enumerate(timesteps):
            latents = torch.cat([golden[f"clip{clip}.step{step}.latent"], y])[None]
            found = model(latents, torch.tensor([[timestep]]), contexts, rotary)
            for branch, velocity in zip(branches, found, strict=True):
                expected = golden[f"clip{clip}.step{step}.{branch}"]
                assert relative_error(velocity[0], expected) < 1e-4
        clip += 1
    assert clip == (2 if case in ("chained", "release") else 1)


@pytest.mark.parametrize("infix", ["", "block."])
def test_loras_of_either_names_fit(infix: str, tmp_path: Path) -> None:
    """Those for image to video have no infix, those that were trained on the release's file have one."""
    torch.manual_seed(0)
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    modules = [f"blocks.3.{infix}{name}" for name in ("self_attn.q", "cross_attn.k_img")]
    tensors = {}
    for module in modules:
        tensors |= {f"{module}.lora_A.weight": down.clone(), f"{module}.lora_B.weight": up.clone()}
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = LoraSetting("lora", tmp_path / "lora.safetensors", 1.0, None)
    loaded = []
    for loras in ([], [lora]):
        checkpoint = open_golden("wan_animate_2", loras)
        query = checkpoint.transformers[0].load(CPU).blocks[3].self_attn.qkv.weight[:64]
        block = checkpoint.context_projections[0].load(CPU).layers()["blocks.3"]
        loaded.append((query, block.cross_attn.kv_img.weight[:64]))
    for weight, changed in zip(*loaded, strict=True):
        torch.testing.assert_close(changed, weight + up @ down)
