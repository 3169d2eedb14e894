"""Speech to video's transformer against the reference: every step of the cases, the parts of one."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import FIXTURES, golden_folder, relative_error
from tests.sampling import make_plain_solver
from tests.unit.weights.test_checkpoint import Manifest
from wan_dist.models.audio_projection import AudioProjection
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.context import ContextProjection
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.speech import (
    AudioBlock,
    ClipInputs,
    SpeechTransformer,
    spread_positions,
)
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.published_dims import DIMS_S2V_14B
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_audio_projection, open_checkpoint, open_transformer
from wan_dist.weights.checkpoint_dims import infer_transformer_dims
from wan_dist.weights.key_maps import map_original_transformer, map_single_file_transformer
from wan_dist.weights.layout import WEIGHTS_STEM, ComponentFiles
from wan_dist.weights.load import check_keys

CPU = torch.device("cpu")
FOLDER = "wan2.2-s2v"
Golden = dict[str, Tensor]


def load_models(
    dtype: torch.dtype,
) -> tuple[SpeechTransformer, ContextProjection, AudioProjection]:
    files = ComponentFiles(
        golden_folder(FOLDER), WEIGHTS_STEM, map_original_transformer, "config.json"
    )
    transformer, projection = open_transformer(files, dtype, ())
    model = transformer.load(CPU)
    assert isinstance(model, SpeechTransformer)
    audio = open_audio_projection(transformer, dtype)
    assert audio is not None
    return model, projection.load(CPU), audio.load(CPU)


def read_case(case: str) -> tuple[dict, Golden]:
    folder = golden_folder(FOLDER) / "expected"
    run = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    return run, load_file(folder / f"{case}.safetensors")


def select_inputs(golden: Golden, clip: int) -> ClipInputs:
    history, pose = (golden.get(f"clip{clip}.{name}_latents") for name in ("motion", "pose"))
    return ClipInputs(
        golden["input.ref_latents"][None],
        None if history is None else history[None],
        None if pose is None else pose[None],
    )


def make_contexts(
    projection: ContextProjection, audio: AudioProjection, golden: Golden, features: Tensor
) -> list[ContextKV]:
    """Return the contexts of the prompt, and of the negative prompt, which hears zeros."""
    texts = projection([golden["input.context"], golden["input.context_null"]])
    heard = (features, torch.zeros_like(features))
    return [replace(text, audio=audio(part)) for text, part in zip(texts, heard, strict=True)]


@pytest.mark.parametrize("case", ["unipc", "pose", "first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_every_step_of_every_clip(case: str, dtype: torch.dtype, tolerance: float) -> None:
    model, projection, audio = load_models(dtype)
    run, golden = read_case(case)
    timesteps = make_plain_solver(run["solver"], run["steps"], run["shift"]).timesteps
    length = run["infer_frames"]
    for clip in range(run["clips"]):
        model.clip_inputs = select_inputs(golden, clip)
        columns = golden["input.audio_embed"][..., clip * length : (clip + 1) * length]
        contexts = make_contexts(projection, audio, golden, columns)
        rotary = model.compute_rotary(golden[f"clip{clip}.step0.latent"][None])
        for step, timestep in enumerate(timesteps):
            name = f"clip{clip}.step{step}"
            velocities = model(
                golden[f"{name}.latent"][None], torch.tensor([[timestep]]), contexts, rotary
            )
            for branch, velocity in zip(("cond", "uncond"), velocities, strict=True):
                assert velocity.dtype == torch.float32
                assert relative_error(velocity[0], golden[f"{name}.{branch}"]) < tolerance


def test_parts_of_a_step() -> None:
    """Tokens, rotary factors, audio's tokens, and a block before and after audio is added."""
    model, projection, audio = load_models(torch.float32)
    run, golden = read_case("pose")
    parts = load_file(golden_folder(FOLDER) / "expected/parts.safetensors")
    model.clip_inputs = select_inputs(golden, 1)
    latents = golden["clip1.step0.latent"][None]
    assert relative_error(model.embed_latents(latents)[0], parts["tokens"]) < 1e-5
    rotary = model.compute_rotary(latents)
    expected_rotary = parts["rotary"]
    torch.testing.assert_close(torch.cat(rotary, 1).transpose(1, 2), expected_rotary)
    assert model.count_segment_tokens(latents, 1) == (64, 80)
    features = golden["input.audio_embed"][..., run["infer_frames"] :]
    tokens, global_tokens = audio.encode(features)
    assert relative_error(tokens[0], parts["audio_tokens"]) < 1e-5
    assert relative_error(global_tokens[0], parts["audio_global"].squeeze(1)) < 1e-5
    timestep = make_plain_solver(run["solver"], run["steps"], run["shift"]).timesteps[0]
    _, time = model.embed_timesteps(torch.tensor([[timestep]]))
    assert relative_error(time[0].transpose(0, 1), parts["time_modulation"]) < 1e-5
    block, (context, _) = model.blocks[0], make_contexts(projection, audio, golden, features)
    assert isinstance(block, AudioBlock)
    arguments = (time, [context.select_block(0)], rotary, (64, 80))
    for frame_segments, name in (((0, 0), "block0"), ((32, 32), "block0_injected")):
        streams = [parts["tokens"][None].clone()]
        (x,) = block(streams, [context.audio[0]], frame_segments, *arguments)
        assert relative_error(x[0], parts[name]) < 1e-5


@pytest.mark.parametrize("max_tokens", [1, 7, 32])
def test_slices_of_tokens_change_nothing(max_tokens: int) -> None:
    model, projection, audio = load_models(torch.float32)
    _, golden = read_case("pose")
    model.clip_inputs = select_inputs(golden, 1)
    latents, timesteps = golden["clip1.step0.latent"][None], torch.tensor([[500.0]])
    contexts = make_contexts(projection, audio, golden, golden["input.audio_embed"][..., 8:])
    rotary = model.compute_rotary(latents)
    whole = model(latents, timesteps, contexts, rotary)
    model.set_slice_tokens(max_tokens)
    for sliced, expected in zip(model(latents, timesteps, contexts, rotary), whole, strict=True):
        torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-5)


def test_timesteps_embedded_ahead_are_the_same() -> None:
    model, projection, audio = load_models(torch.float32)
    _, golden = read_case("unipc")
    model.clip_inputs = select_inputs(golden, 1)
    latents, timesteps = golden["clip1.step0.latent"][None], torch.tensor([[500.0]])
    contexts = make_contexts(projection, audio, golden, golden["input.audio_embed"][..., 8:])
    rotary = model.compute_rotary(latents)
    expected = model(latents, timesteps, contexts, rotary)
    model.precompute_time_embeddings([timesteps])
    for velocity, other in zip(model(latents, timesteps, contexts, rotary), expected, strict=True):
        assert torch.equal(velocity, other)


def test_injections_are_selected_by_their_index() -> None:
    _, _, audio = load_models(torch.float32)
    features = torch.randn(1, 25, 16, 8)
    first, second = audio(features)
    audio.select_injectors([1, 1])
    for selected in audio(features):
        assert torch.equal(selected.modulation, second.modulation)
        assert torch.equal(selected.keys_values, second.keys_values)
    assert not torch.equal(first.keys_values, second.keys_values)


def test_positions_of_the_history() -> None:
    assert spread_positions(44, 4) == [0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 43]
    assert spread_positions(28, 4) == [0, 4, 9, 13, 18, 22, 27]
    assert spread_positions(4, 2) == [0, 3]
    assert spread_positions(4, 4) == [0]
    assert spread_positions(3, 1) == [0, 1, 2]


@pytest.mark.parametrize("has_config", [True, False])
def test_the_published_checkpoint_fits(has_config: bool) -> None:
    files = Manifest("wan2.2-s2v-14B")
    key_map = map_single_file_transformer(files.shapes)
    dims = infer_transformer_dims(files.config if has_config else {}, files, key_map)
    assert dims.audio_layers == (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    for name, value in vars(DIMS_S2V_14B).items():
        assert getattr(dims, name) == value, name
    with torch.device("meta"):
        models = [build_transformer(dims, torch.bfloat16)]
        models += [kind(dims, torch.bfloat16) for kind in (ContextProjection, AudioProjection)]
    assert check_keys(models, files, key_map) == []
    num_params = sum(parameter.numel() for model in models for parameter in model.parameters())
    assert num_params == files.num_params
    assert (FIXTURES / "manifests/wan2.2-s2v-14B.json").stat().st_size < 10**5


def test_other_tasks_refuse_it() -> None:
    with pytest.raises(InputError, match="1 audio branches, not 0"):
        open_checkpoint(golden_folder(FOLDER), TASKS["t2v-1.3B"], torch.float32)
