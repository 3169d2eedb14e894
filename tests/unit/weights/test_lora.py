"""LoRA files of every kind and naming give the weights and outputs of the formulas, and bad ones are named.

The goldens were made from the formulas in float64, by goldens/files/make_lora.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import SHARED_GOLDENS, golden_folder, relative_error
from tests.sampling import make_plain_solver
from wan_dist.config.loras import LoraSetting
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.key_maps import map_original_transformer

CPU = torch.device("cpu")
FILES = SHARED_GOLDENS / "files"
EXPECTED: dict[str, Any] = (
    json.loads((FILES / "expected/lora.json").read_text(encoding="utf-8"))
    if FILES.exists()
    else {"cases": {}, "refuse": {}}
)
CASES: dict[str, Any] = EXPECTED["cases"]
TASK_BY_MODEL = {
    "wan2.1-t2v": "t2v-1.3B",
    "wan2.1-i2v": "i2v-14B",
    "wan2.2-t2v-a14b": "t2v-A14B",
}
EXPERTS = {None: 0, "high": 0, "low": 1}


def open_golden(
    model: str,
    *files: tuple[str | Path, float],
    expert: str | None = None,
    allow_unmatched: bool = False,
    transformer: Path | None = None,
) -> Checkpoint:
    key = "lora" if expert is None else f"lora_{expert}"
    return open_checkpoint(
        golden_folder(model),
        TASKS[TASK_BY_MODEL[model]],
        torch.float32,
        given_files={"dit_file": [transformer]} if transformer else {},
        loras=[LoraSetting(key, FILES / file, strength, expert) for file, strength in files],
        allow_unmatched=allow_unmatched,
    )


def open_case(case: dict[str, Any]) -> Checkpoint:
    return open_golden(
        case["model"],
        *((entry["file"], entry["strength"]) for entry in case["files"]),
        expert=case["expert"],
        allow_unmatched=bool(case["unmatched"]),
    )


def read_weights(checkpoint: Checkpoint, expert_index: int = 0) -> dict[str, Tensor]:
    """Return a transformer's parameters by the original layout's names, its context projection's too."""
    weights = {}
    for components in (checkpoint.transformers, checkpoint.context_projections):
        model = components[expert_index].load(CPU)
        for name, parameter in model.named_parameters():
            sources = map_original_transformer(()).find_sources(name)
            for source, part in zip(sources, parameter.chunk(len(sources)), strict=True):
                weights[source.key] = part
    return weights


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_the_formulas(name: str) -> None:
    case = CASES[name]
    expert_index = EXPERTS[case["expert"]]
    weights = read_weights(open_case(case), expert_index)
    plain = read_weights(open_golden(case["model"]), expert_index)
    stored = load_file(FILES / "expected/lora-weights.safetensors")
    expected = {
        key.partition("/")[2]: value
        for key, value in stored.items()
        if key.startswith(f"{case['weights_of']}/")
    }
    errors = {key: relative_error(weights[key], value) for key, value in expected.items()}
    assert max(errors.values(), default=0.0) < 1e-6
    sums = {key: weights[key].double().abs().sum().item() for key in case["sums"]}
    assert sums == pytest.approx(case["sums"], rel=1e-6)
    assert {key for key in plain if not torch.equal(plain[key], weights[key])} == set(sums)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_merged_model(name: str) -> None:
    case = CASES[name]
    checkpoint, expert_index, step = open_case(case), EXPERTS[case["expert"]], case["step"]
    folder = golden_folder(case["model"]) / "expected"
    golden = load_file(folder / "unipc.safetensors")
    run = json.loads((folder / "unipc.json").read_text(encoding="utf-8"))
    model = checkpoint.transformers[expert_index].load(CPU, inner_attention=InnerAttention())
    projection = checkpoint.context_projections[expert_index].load(CPU)
    latents = golden[f"step{step}.latent"]
    rotary = model.compute_rotary(latents.unsqueeze(0))
    if "input.y" in golden:
        latents = torch.cat([latents, golden["input.y"]])
    contexts = projection([golden["input.context"]], golden.get("input.clip_fea"))
    timestep = make_plain_solver(run["solver"], run["steps"], run["shift"]).timesteps[step]
    timesteps = torch.tensor([[timestep]])
    (velocity,) = model(latents.unsqueeze(0), timesteps, contexts, rotary)
    expected = load_file(FILES / "expected/lora-outputs.safetensors")[case["output_of"]]
    assert relative_error(velocity[0], expected) < 1e-5


UNMATCHED = CASES.get("unmatched", {})


def test_what_fits_nothing_is_named_and_may_be_left_out() -> None:
    if not UNMATCHED:
        pytest.skip("the goldens of LoRA files are not beside this checkout")
    with pytest.raises(InputError) as caught:
        open_golden("wan2.1-t2v", ("lora/unmatched.safetensors", 1.0))
    for text in (
        "lora/unmatched.safetensors does not fit this model",
        "2 tensors of an image branch that this model does not have (diffusion_model.blocks.0.cross_",
        "2 tensors of blocks beyond the 3 that this model has (diffusion_model.blocks.7.self_attn.q",
        "2 tensors of VACE that this model does not have (diffusion_model.vace_blocks.0.self_attn.q",
        "2 tensors of the text encoder, which LoRAs are not merged into (lora_te_text_model_encoder",
        "its other 30 modules do; lora_unmatched=allow leaves the rest out",
    ):
        assert text in str(caught.value)
    (lora,) = open_case(UNMATCHED).loras
    (warning,) = lora.warnings
    assert "left out are 2 tensors of VACE" in warning
    assert "30 modules" in lora.description


REFUSALS = {
    "half-a-pair": "is not complete: blocks.1.ffn.0 has lora_A (lora_down) and no lora_B (lora_up)",
    "other-width": "was made for a model 96 wide, and this one is 64 wide; 4 of its modules do not fit: "
    "blocks.0.self_attn.k is for 96 inputs and 96 outputs, not 64 and 64",
    "other-model": "does not fit this model: 2 tensors of no module of this model "
    "(transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "wider-input": "does not fit this model; 1 of its modules do not fit: "
    "patch_embedding is a difference of (64, 36, 1, 2, 2), not of (64, 16, 1, 2, 2); "
    "LoRAs that give the model more input channels are not supported",
    "not-finite": "has numbers that are not finite (in diffusion_model.blocks.0.self_attn.q.lora_A.weight)",
    "oft": "is OFT, which rotates weights, which is not supported",
    "empty": "has no tensors of a LoRA (found: step)",
    "whole-model": "is a transformer, not a LoRA; use dit_file= for it",
}


@pytest.mark.parametrize("file", EXPECTED["refuse"])
@pytest.mark.parametrize("allow_unmatched", [False, True])
def test_files_that_cannot_be_used_are_named(file: str, allow_unmatched: bool) -> None:
    with pytest.raises(InputError) as caught:
        open_golden("wan2.1-t2v", (file, 1.0), allow_unmatched=allow_unmatched)
    assert f"lora={FILES / file} {REFUSALS[Path(file).stem]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_file_to_refuse_is_refused() -> None:
    assert {Path(file).stem for file in EXPECTED["refuse"]} in (set(REFUSALS), set())


DESCRIPTIONS = {
    "kohya": "kohya.safetensors: LoRA of 30 modules, rank 4, alpha 2, original names after lora_unet_, "
    "strength 1",
    "ranks-diffusers": "ranks-diffusers.safetensors: LoRA of 30 modules, ranks 2 to 8, no alpha, "
    "Diffusers names after transformer., strength 1",
    "peft-rslora": "adapter_model.safetensors: LoRA of 30 modules, rank 4, alpha 1, "
    "original names after base_model.model., strength 1",
    "dora-half": "dora.safetensors: DoRA of LoRA of 3 modules, rank 4, alpha 2, "
    "original names after lora_unet_, strength 0.5",
    "diff-bias": "diff-bias.safetensors: LoRA and differences of 31 modules, rank 4, no alpha, "
    "original names after diffusion_model., strength 1",
    "a14b-low": "a14b-low.safetensors: LoRA of 30 modules, rank 4, alpha 2, "
    "original names after diffusion_model., strength 0.5, for low noise",
}


@pytest.mark.parametrize("name", [name for name in CASES if name in DESCRIPTIONS])
def test_the_log_says_what_was_found(name: str) -> None:
    (lora,) = open_case(CASES[name]).loras
    assert lora.description == DESCRIPTIONS[name]
    assert lora.warnings == ()


@pytest.mark.parametrize("name", CASES)
def test_every_module_of_a_file_is_found(name: str) -> None:
    case = CASES[name]
    touched = {key.removesuffix(".weight").removesuffix(".bias") for key in case["sums"]}
    for lora in open_case(case).loras:
        assert f" of {len(touched)} modules, " in lora.description


ENCODED = (
    *("gguf/t2v-q8_0.gguf", "gguf/t2v-q5_1-prefix.gguf"),
    *("single/lightx2v-int8.safetensors", "single/lightx2v-fp8.safetensors"),
    *("single/kijai-fp8-scaled-e5m2.safetensors", "single/comfy-fp8-scaled.safetensors"),
)


@pytest.mark.parametrize("file", ENCODED)
def test_updates_are_added_to_the_values_of_encoded_weights(file: str) -> None:
    """Of their values, not of the numbers that are stored for them."""
    if not FILES.exists():
        pytest.skip("the goldens of LoRA files are not beside this checkout")
    transformer = FILES / file
    lora = ("lora/original-ab.safetensors", 1.0)
    plain = read_weights(open_golden("wan2.1-t2v", transformer=transformer))
    merged = read_weights(
        open_golden("wan2.1-t2v", lora, transformer=transformer, allow_unmatched=True)
    )
    down_and_up = load_file(FILES / lora[0])
    num_merged = 0
    for key in plain:
        module = f"diffusion_model.{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in down_and_up:
            assert torch.equal(plain[key], merged[key]), key
            continue
        down, up = (down_and_up[f"{module}.lora_{part}.weight"].double() for part in "AB")
        assert relative_error(merged[key], plain[key].double() + up @ down) < 1e-6
        num_merged += 1
    assert num_merged >= 10
