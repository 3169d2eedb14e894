"""On a GPU: the VAE's Triton kernels against the same arithmetic in PyTorch, and the whole VAE in
bfloat16 against float32.
"""

import pytest
import torch

from tests.conftest import relative_error
from tests.ranks.vae_worker import VAES, random_vae
from wan_dist.models.vae import ops as vae_elementwise
from wan_dist.models.vae.model import WanVae

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def video(channels: int, frames: int, width: int) -> torch.Tensor:
    x = torch.randn(1, channels, frames, 5, width, device=CUDA).bfloat16()
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels", [96, 160, 192, 384, 1024])
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernels_are_the_arithmetic(
    channels: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, wide = video(channels, 4, 7), video(channels, 4, 11)
    bias = torch.randn(channels, device=CUDA).bfloat16() if has_bias else None
    gamma = torch.rand(channels, 1, 1, 1, device=CUDA)
    room, expected = video(channels, 6, 7).zero_(), torch.empty_like(x)
    vae_elementwise.write_norm_silu(x, bias, gamma, room[:, :, 2:])
    total = vae_elementwise.add_residual_(x.clone(), wide[..., 2:9], bias)
    phases = video(4 * channels, 3, 6)
    doubled = vae_elementwise.interleave_phases(phases, gamma.flatten().bfloat16())
    monkeypatch.setattr(vae_elementwise, "_select_kernels", lambda *_: None)
    vae_elementwise.write_norm_silu(x, bias, gamma, expected)
    assert (
        relative_error(
            doubled, vae_elementwise.interleave_phases(phases, gamma.flatten().bfloat16())
        )
        < 1e-3
    )
    assert not room[:, :, :2].any()
    assert relative_error(room[:, :, 2:], expected) < 1e-3
    assert (
        relative_error(total, vae_elementwise.add_residual_(x.clone(), wide[..., 2:9], bias)) < 1e-3
    )


@pytest.mark.parametrize("name", VAES)
def test_bfloat16_is_close(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = random_vae(VAES[name]).to(CUDA)
    vae = WanVae(VAES[name], torch.bfloat16).to(CUDA).eval().requires_grad_(False)
    vae.load_state_dict(exact.state_dict())
    vae.optimize_memory_format()
    latents = torch.randn(1, VAES[name].latent_dim, 4, 6, 8, device=CUDA)
    expected = torch.cat(list(exact.decode(latents)), dim=2)
    for vae.latents_per_chunk in (1, 2):
        error = relative_error(torch.cat(list(vae.decode(latents)), dim=2), expected)
        print(f"{name} decode {error:.2e}")
        assert error < 3e-2
