import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES, golden_folder, relative_error
from tests.sampling import make_plain_solver
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.rotary import apply_rotary, compute_rotary_tables
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import TransformerDims, VaeDims
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer, list_time_layers
from wan_dist.models.image_encoder import encode_images
from wan_dist.models.text_encoder import TextEncoder, clean_prompt
from wan_dist.models.transformer import PatchEmbedding
from wan_dist.models.vae.layers import Upsample, patchify_pixels, unpatchify_pixels
from wan_dist.models.vae.model import WanVae, split_frames_into_chunks
from wan_dist.models.vae.video_state import VideoState
from wan_dist.pipeline.conditioning.encoders import convert_image_to_tensor
from wan_dist.pipeline.conditioning.image import make_image_chunks, make_image_mask
from wan_dist.tasks.images import read_image
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
COMPONENTS = load_file(FIXTURES / "components/wan21.safetensors")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32)


@pytest.fixture(scope="module")
def vae(checkpoint: Checkpoint) -> WanVae:
    return checkpoint.vae.load(CPU)


def test_text_encoder(checkpoint: Checkpoint) -> None:
    encode = TextEncoder(
        checkpoint.text_encoder.load(CPU), checkpoint.tokenizer, text_len=512, device=CPU
    )
    for index, text in enumerate(
        json.loads((FIXTURES / "components/t5_texts.json").read_text(encoding="utf-8"))
    ):
        torch.testing.assert_close(encode(text), COMPONENTS[f"t5.{index}"], rtol=0, atol=1e-4)


def test_prompts_are_cleaned() -> None:
    assert clean_prompt("  two &amp;amp; cats \n\t schÃ¶n ") == "two & cats schön"


def test_vae_encode(vae: WanVae) -> None:
    latents = vae.encode(split_frames_into_chunks(COMPONENTS["vae21.video"].unsqueeze(0)))[0]
    torch.testing.assert_close(latents, COMPONENTS["vae21.latent"], rtol=0, atol=1e-4)


def test_vae_decode_yields_frames_as_they_are_ready(vae: WanVae) -> None:
    chunks = list(vae.decode(COMPONENTS["vae21.latent"].unsqueeze(0)))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    torch.testing.assert_close(
        torch.cat(chunks, dim=2)[0], COMPONENTS["vae21.decoded"], rtol=0, atol=1e-4
    )


def test_vae_encodes_a_single_frame(vae: WanVae) -> None:
    video = COMPONENTS["vae21.video"].unsqueeze(0)
    torch.testing.assert_close(
        vae.encode([video[:, :, :1]])[:, :, 0], vae.encode(split_frames_into_chunks(video))[:, :, 0]
    )


def test_vae_chunks_are_independent_of_their_length(vae: WanVae) -> None:
    """The causal cache makes any split in time the same computation: all later latents in one chunk
    against one by one.
    """
    latents = COMPONENTS["vae21.latent"].unsqueeze(0)
    one_by_one, together = VideoState(), VideoState()
    expected = torch.cat(
        [vae.decoder(latent, one_by_one) for latent in latents.split(1, dim=2)], dim=2
    )
    actual = torch.cat(
        [vae.decoder(chunk, together) for chunk in (latents[:, :, :1], latents[:, :, 1:])], dim=2
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


STEPS = [
    ("wan2.1-t2v", "t2v-1.3B", "unipc"),
    ("wan2.1-t2v", "t2v-1.3B", "dpmpp"),
    ("wan2.1-t2v", "t2v-1.3B", "odd"),
    ("wan2.1-i2v", "i2v-14B", "unipc"),
    ("wan2.1-flf2v", "flf2v-14B", "unipc"),
    ("wan2.2-t2v-a14b", "t2v-A14B", "unipc"),
    ("wan2.2-i2v-a14b", "i2v-A14B", "unipc"),
    ("wan2.2-ti2v-5b", "ti2v-5B", "t2v"),
    ("wan2.2-ti2v-5b", "ti2v-5B", "i2v"),
    ("wan2.1-vace", "vace-14B", "mask"),
    ("wan2.1-vace", "vace-14B", "mask_ref"),
    ("wan-fun/inp-a14b", "fun-inp-A14B", "text"),
    ("wan-fun/control-a14b", "fun-control-A14B", "ref"),
    ("wan-fun/control-a14b", "fun-control-A14B", "start_end"),
    ("wan-fun/control-2.1-14b", "fun-control-14B", "ref"),
    ("wan-fun/control-2.1-14b", "fun-control-14B", "start"),
]


@pytest.mark.parametrize(("folder", "task", "case"), STEPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_every_step_of_the_transformer(
    folder: str, task: str, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    checkpoint = open_checkpoint(golden_folder(folder), TASKS[task], dtype)
    models = [component.load(CPU) for component in checkpoint.transformers]
    projections = [component.load(CPU) for component in checkpoint.context_projections]
    golden = load_file(golden_folder(folder) / f"expected/{case}.safetensors")
    features = golden.get("input.clip_fea")
    if features is not None and features.dim() == 2:
        features = features.unsqueeze(0)
    extra = golden.get("input.y", golden.get("input.vace_context"))
    reference = golden["input.ref_latent"][None, :, None] if "input.ref_latent" in golden else None
    first_latents = golden["step0.latent"].unsqueeze(0)
    rotary = models[0].compute_rotary(first_latents, int(reference is not None))
    boundary = (TASKS[task].expert_boundary or 0) * 1000
    run = json.loads((golden_folder(folder) / f"expected/{case}.json").read_text(encoding="utf-8"))
    # Not the file's own timesteps: of two for a step, where an image is given, it holds the first, which
    # is always 0.
    for step, timestep in enumerate(
        make_plain_solver(
            run["solver"].replace("dpmpp", "dpm++"), run["steps"], run["shift"]
        ).timesteps
    ):
        expert = 0 if timestep >= boundary else 1
        latents = (
            golden[f"step{step}.latent"]
            if extra is None
            else torch.cat([golden[f"step{step}.latent"], extra])
        )
        timesteps = torch.tensor([[0, timestep]] if case == "i2v" else [[timestep]])
        contexts = projections[expert](
            [golden["input.context"], golden["input.context_null"]], features
        )
        control = projections[expert].embed_control(reference, None, first_latents.shape[2:])
        for branch, velocity in zip(
            ("cond", "uncond"),
            models[expert](latents.unsqueeze(0), timesteps, contexts, rotary, control=control),
            strict=True,
        ):
            assert velocity.dtype == torch.float32
            assert relative_error(velocity[0], golden[f"step{step}.{branch}"]) < tolerance


@pytest.mark.parametrize(
    ("folder", "task", "case"),
    [("wan2.1-i2v", "i2v-14B", "unipc"), ("wan2.1-flf2v", "flf2v-14B", "unipc")],
)
def test_what_images_become(folder: str, task: str, case: str) -> None:
    checkpoint = open_checkpoint(golden_folder(folder), TASKS[task], torch.float32)
    golden = load_file(golden_folder(folder) / f"expected/{case}.safetensors")
    images = [
        convert_image_to_tensor(read_image(str(path), "image"))
        for path in sorted(golden_folder(folder).glob("*.png"))
    ]
    assert checkpoint.image_encoder is not None
    features = encode_images(checkpoint.image_encoder.load(CPU), images, image_size=224)
    torch.testing.assert_close(features, golden["input.clip_fea"], rtol=0, atol=1e-4)
    frames, height, width = golden["video"].shape[1:]
    chunks = make_image_chunks(
        images[0], images[1] if images[1:] else None, frame_num=frames, height=height, width=width
    )
    mask = make_image_mask(tuple(golden["step0.latent"].shape), has_last_image=len(images) > 1)
    extra = torch.cat([mask, checkpoint.vae.load(CPU).encode(chunks)], dim=1)
    torch.testing.assert_close(extra[0], golden["input.y"], rtol=0, atol=1e-4)


def test_vae_2_2() -> None:
    path = golden_folder("wan2.2-ti2v-5b").parent / "components/wan22.safetensors"
    golden = load_file(path)
    vae = open_checkpoint(
        golden_folder("wan2.2-ti2v-5b"), TASKS["ti2v-5B"], torch.float32
    ).vae.load(CPU)
    latents = vae.encode(split_frames_into_chunks(golden["vae22.video"].unsqueeze(0)))[0]
    torch.testing.assert_close(latents, golden["vae22.latent"], rtol=0, atol=1e-4)
    frames = torch.cat(list(vae.decode(golden["vae22.latent"].unsqueeze(0))), dim=2)[0]
    torch.testing.assert_close(frames, golden["vae22.decoded"], rtol=0, atol=1e-4)


def test_pixels_and_channels_are_the_same_video() -> None:
    video = torch.randn(2, 3, 5, 6, 8)
    channels = patchify_pixels(video)
    assert channels.shape == (2, 12, 5, 3, 4)
    assert torch.equal(unpatchify_pixels(channels), video)


TINY = {
    "num_layers": 2,
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 4,
    "in_dim": 4,
    "out_dim": 4,
    "text_dim": 8,
    "text_len": 6,
}


def tiny_transformer(dtype: torch.dtype = torch.float32, **changes: int) -> FusedTransformer:
    dims = {**TINY, **changes}
    torch.manual_seed(0)
    model = FusedTransformer(TransformerDims(**dims), dtype)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


def tiny_contexts(*lengths: int) -> list[ContextKV]:
    projection = ContextProjection(TransformerDims(**TINY), torch.float32)
    for parameter in projection.parameters():
        parameter.normal_(std=0.2)
    return projection([torch.randn(length, 8) for length in lengths])


def test_a_batch_is_its_samples() -> None:
    model = tiny_transformer()
    latents, timesteps = torch.randn(2, 4, 3, 4, 6), torch.tensor([[10.0], [900.0]])
    (text,), rotary = tiny_contexts(3), model.compute_rotary(latents)
    both = ContextKV(text.text.expand(-1, -1, 2, -1, -1, -1))
    (together,) = model(latents, timesteps, [both], rotary)
    for i in range(2):
        (alone,) = model(latents[i : i + 1], timesteps[i : i + 1], [text], rotary)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_contexts_together_are_contexts_one_by_one() -> None:
    model = tiny_transformer()
    latents, timesteps = torch.randn(1, 4, 3, 4, 6), torch.tensor([[500.0]])
    contexts, rotary = tiny_contexts(3, 5, 6), model.compute_rotary(latents)
    together = model(latents, timesteps, contexts, rotary)
    for context, velocity in zip(contexts, together, strict=True):
        assert torch.equal(model(latents, timesteps, [context], rotary)[0], velocity)
    assert relative_error(together[0], together[1]) > 1e-3


def test_long_sequences_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer()
    latents, contexts = torch.randn(1, 4, 3, 4, 6), tiny_contexts(3)
    rotary = model.compute_rotary(latents)
    for timesteps in (torch.tensor([[500.0]]), torch.tensor([[0.0, 500.0]])):
        (whole,) = model(latents, timesteps, contexts, rotary)
        with monkeypatch.context() as patch:
            patch.setattr("wan_dist.models.kernels.transformer_ops.FLOAT32_CHUNK_TOKENS", 5)
            torch.testing.assert_close(model(latents, timesteps, contexts, rotary)[0], whole)


def test_inner_attention_is_a_seam() -> None:
    """Self-attention goes through the parameter-free module and nothing else: replacing it changes
    the result, keys stay.
    """
    model = tiny_transformer()
    keys = set(model.state_dict())
    seen = []

    class Spy(InnerAttention):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            seen.append(q.shape)
            return super().forward(q, k, v)

    for block in model.blocks:
        block.self_attn.inner_attention = Spy()
    assert set(model.state_dict()) == keys
    latents = torch.randn(1, 4, 3, 4, 6)
    model(latents, torch.tensor([[500.0]]), tiny_contexts(3), model.compute_rotary(latents))
    assert seen == [(1, 18, 4, 12)] * 2


def test_timestep_modulation_is_not_expanded_over_tokens() -> None:
    model = tiny_transformer()
    _, block_time = model.embed_timesteps(torch.tensor([[500.0]]))
    assert block_time.shape == (1, 1, 6, 48)
    assert block_time.dtype == torch.float32


def test_timesteps_embedded_ahead_are_the_same() -> None:
    model = tiny_transformer()
    latents, timesteps = (
        torch.randn(1, 4, 3, 4, 6),
        [torch.tensor([[500.0]]), torch.tensor([[0.0, 20.0]])],
    )
    contexts, rotary = tiny_contexts(3), model.compute_rotary(latents)
    expected = [model(latents, each, contexts, rotary)[0] for each in timesteps]
    time_layers = {name: getattr(model, name) for name in list_time_layers(model.dims)}
    model.precompute_time_embeddings(timesteps[1:])
    assert model.has_time_embeddings(timesteps[1:])
    assert not model.has_time_embeddings(timesteps)
    model.precompute_time_embeddings(timesteps, time_layers)
    assert not any(name.startswith("time_") for name, _ in model.named_parameters())
    for each, velocity in zip(timesteps, expected, strict=True):
        assert torch.equal(model(latents, each, contexts, rotary)[0], velocity)
    with pytest.raises(KeyError):
        model(latents, torch.tensor([[7.0]]), contexts, rotary)


def test_two_timesteps_are_two_rows_and_the_same_as_one_where_they_agree() -> None:
    model = tiny_transformer()
    latents = torch.randn(1, 4, 3, 4, 6)
    contexts, rotary = tiny_contexts(3), model.compute_rotary(latents)
    (once,) = model(latents, torch.tensor([[500.0]]), contexts, rotary)
    torch.testing.assert_close(
        model(latents, torch.tensor([[500.0, 500.0]]), contexts, rotary)[0], once
    )
    assert (
        relative_error(model(latents, torch.tensor([[0.0, 500.0]]), contexts, rotary)[0], once)
        > 1e-3
    )
    assert model.embed_timesteps(torch.tensor([[0.0, 500.0]]))[1].shape == (1, 2, 6, 48)


def test_precision_of_each_part() -> None:
    projection = ContextProjection(
        TransformerDims(**TINY, image_dim=10, image_positions=4), torch.bfloat16
    )
    for model in (tiny_transformer(torch.bfloat16), projection):
        float32 = {
            name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32
        }
        parts = ("norm", "modulation", "time_embedding", "time_projection", "head", "img_emb")
        assert float32 == {
            name for name, _ in model.named_parameters() if any(part in name for part in parts)
        }


def test_patch_embedding_is_the_convolution() -> None:
    embedding = tiny_transformer().patch_embedding
    assert isinstance(embedding, PatchEmbedding)
    latents = torch.randn(2, 4, 3, 4, 6)
    expected = (
        torch.nn.functional.conv3d(latents, embedding.weight, embedding.bias, stride=(1, 2, 2))
        .flatten(2)
        .transpose(1, 2)
    )
    torch.testing.assert_close(embedding(latents), expected)


def test_rotary_is_a_complex_rotation_per_axis() -> None:
    grid, width = (3, 4, 5), 128
    x = torch.randn(1, 60, 2, width, dtype=torch.float64)
    positions = torch.cartesian_prod(*(torch.arange(length) for length in grid)).double()
    angles = torch.cat(
        [
            torch.outer(positions[:, axis], 10000 ** (-2 * torch.arange(n).double() / (2 * n)))
            for axis, n in enumerate((22, 21, 21))
        ],
        dim=1,
    )
    rotation = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation
    ).flatten(-2)
    cos, sin = compute_rotary_tables(grid, width, device=CPU)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(
        apply_rotary(x, (cos.double(), sin.double())), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 2)])
def test_convolving_before_doubling_is_convolving_after(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = Upsample(6, 4, temporal=False)
    x = torch.randn(1, 6, 3, *size)
    with torch.no_grad():
        expected = layer(x, VideoState())
        layer.prepare_phase_weight()
        torch.testing.assert_close(layer(x, VideoState()), expected, rtol=0, atol=1e-6)


def test_decoding_memory_does_not_grow_with_frames(vae: WanVae) -> None:
    """What the decoder remembers between chunks is the same after 2 latent frames and after 6."""

    def remembered(num_latents: int) -> int:
        state = VideoState()
        for _ in range(num_latents):
            vae.decoder(torch.randn(1, 16, 1, 4, 4), state)
        return sum(
            value.untyped_storage().nbytes()
            for value in state.past_frames.values()
            if value is not None
        )

    assert remembered(2) == remembered(6)


def test_vae_width_comes_from_its_dims() -> None:
    with torch.device("meta"):
        assert WanVae(VaeDims(dim=8, decoder_dim=12)).decoder.conv1.weight.shape == (
            48,
            16,
            3,
            3,
            3,
        )
