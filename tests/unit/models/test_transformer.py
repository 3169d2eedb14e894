"""The plain transformer, which says what Wan is, and the fused one, which runs: the same result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import relative_error
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.transformer import WanTransformer
from wan_dist.sampling.guidance import make_timestep_rows

TEXT = TransformerDims(
    dim=64, ffn_dim=128, num_heads=4, num_layers=3, text_dim=32, freq_dim=32, text_len=24
)
DIMS = {"text": TEXT, "images": replace(TEXT, image_dim=48)}


def make_models(
    dims: TransformerDims, dtype: torch.dtype
) -> tuple[WanTransformer, FusedTransformer]:
    torch.manual_seed(0)
    plain, fused = WanTransformer(dims, dtype), FusedTransformer(dims, dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def project(dims: TransformerDims, dtype: torch.dtype) -> tuple[list[ContextKV], list[ContextKV]]:
    """Return the context of a text of 7 tokens with all its padding, and with the padding as one row."""
    torch.manual_seed(1)
    projection = ContextProjection(dims, dtype)
    text = torch.randn(7, dims.text_dim)
    padded = torch.cat([text, torch.zeros(dims.text_len - 7, dims.text_dim)])
    images = torch.randn(2, 257, dims.image_dim) if dims.image_dim else None
    with torch.no_grad():
        return projection([padded], images), projection([text], images)


def largest_difference(kind: str, dtype: torch.dtype, timesteps: Tensor) -> float:
    dims = DIMS[kind]
    plain, fused = make_models(dims, dtype)
    whole, shortened = project(dims, dtype)
    latents = torch.randn(1, dims.in_dim, 3, 4, 6)
    rotary = plain.compute_rotary(latents)
    contexts = [whole[0].select_block(index) for index in range(dims.num_layers)]
    with torch.no_grad():
        expected = plain(latents, timesteps, contexts, rotary)
        (found,) = fused(latents, timesteps, shortened, rotary)
    assert found.shape == expected.shape == latents.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", DIMS)
@pytest.mark.parametrize(
    "timesteps", [[[500]], [[0, 500]]], ids=["one timestep", "known first frame"]
)
def test_the_fused_transformer_is_the_plain_one(kind: str, timesteps: list[list[int]]) -> None:
    assert largest_difference(kind, torch.float32, torch.tensor(timesteps)) < 1e-6


MEAN_FLOW = replace(TEXT, takes_next_timestep=True)


def embed_by_hand(weights: dict[str, Tensor], timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings for head and blocks as LightX2V's code says, of timesteps (R, 2)."""

    def embed(name: str, values: Tensor) -> Tensor:
        angles = values.double()[:, None] * 10000 ** (-torch.arange(16, dtype=torch.float64) / 16)
        waves = torch.cat([angles.cos(), angles.sin()], 1).float()
        hidden = waves @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        activated = hidden * hidden.sigmoid()
        return activated @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    own = embed("time_embedding", timesteps[:, 0])
    following = embed("time_embedding_r", timesteps[:, 1])
    activated = own * own.sigmoid() + following * following.sigmoid()
    rows = activated @ weights["time_projection.1.weight"].T + weights["time_projection.1.bias"]
    return own, rows.view(len(timesteps), 6, -1)


def test_mean_flow_tells_the_blocks_the_next_timestep_and_the_head_not() -> None:
    plain, fused = make_models(MEAN_FLOW, torch.float32)
    assert {name for name, _ in plain.named_parameters() if "_r." in name} == {
        f"time_embedding_r.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    timesteps = torch.tensor([[[1000, 833.3333]], [[833.3333, 0]]])
    expected = embed_by_hand(dict(plain.named_parameters()), timesteps[:, 0])
    for model in (plain, fused):
        for found, row in zip(model.embed_timesteps(timesteps), expected, strict=True):
            torch.testing.assert_close(found[:, 0], row, rtol=1e-5, atol=1e-5)


def test_mean_flow_gives_the_same_fused_and_with_timesteps_embedded_ahead() -> None:
    plain, fused = make_models(MEAN_FLOW, torch.float32)
    whole, shortened = project(MEAN_FLOW, torch.float32)
    latents = torch.randn(1, 16, 3, 4, 6)
    rotary = plain.compute_rotary(latents)
    contexts = [whole[0].select_block(index) for index in range(3)]
    rows = [
        make_timestep_rows(1000.0, following, has_known_frame=is_known)
        for following in (833.3333, 0.0)
        for is_known in (False, True)
    ]
    expected = [plain(latents, timesteps, contexts, rotary) for timesteps in rows]
    assert relative_error(expected[0], expected[2]) > 1e-3
    for _ in range(2):
        for timesteps, velocity in zip(rows, expected, strict=True):
            (found,) = fused(latents, timesteps, shortened, rotary)
            assert relative_error(found, velocity) < 1e-6
        if not fused.time_embeddings:
            fused.precompute_time_embeddings(rows)
            assert not any(name.startswith("time_") for name, _ in fused.named_parameters())
    assert not fused.has_time_embeddings([make_timestep_rows(1000.0, 7.0, has_known_frame=False)])


def test_in_half_precision_they_differ_by_rounding() -> None:
    assert largest_difference("images", torch.bfloat16, torch.tensor([[500]])) < 2e-2


def test_the_plain_transformer_can_be_trained() -> None:
    dims = DIMS["images"]
    plain, _ = make_models(dims, torch.float32)
    whole, _ = project(dims, torch.float32)
    latents = torch.randn(2, dims.in_dim, 2, 4, 4)
    contexts = [
        tuple(part.expand(2, -1, -1, -1) for part in whole[0].select_block(index))
        for index in range(dims.num_layers)
    ]
    with torch.enable_grad():
        rotary = plain.compute_rotary(latents)
        plain(latents, torch.tensor([[500], [20]]), contexts, rotary).square().mean().backward()
    gradients = [parameter.grad for parameter in plain.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
