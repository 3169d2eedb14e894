"""The plain transformer, which says what Wan is, and the fused one, which runs: the same result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.transformer import WanTransformer

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
