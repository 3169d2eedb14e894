"""Initial noise of a video's latents."""

import torch
from torch import Tensor


def draw_initial_noise(
    shape: tuple[int, ...], *, seed: int, noise_device: str, device: torch.device
) -> Tensor:
    """Return standard normal noise (float32) on ``device``, drawn on ``noise_device`` by a new generator.

    A CPU generator gives the same noise on every machine; a CUDA one gives the reference's noise on a GPU.
    """
    generator = torch.Generator(noise_device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=noise_device, dtype=torch.float32).to(
        device
    )
