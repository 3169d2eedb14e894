"""What the transformer is given beside the noise, and the noise itself.

Shapes: F frames, H W pixels; T h w latent frames, rows and columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Everything that stays the same for all steps."""

    context: Tensor
    """Text embedding (tokens, text_dim) of the prompt."""
    negative_context: Tensor | None
    """That of the negative prompt; None where guidance is off."""
    image_features: Tensor | None = None
    """CLIP features (n, 257, image_dim) of n images."""
    extra_channels: Tensor | None = None
    """(1, C', T, h, w), appended to the noisy latents: which frames are given, and the latents of a video that holds them."""
    known_latents: Tensor | None = None
    """(1, C, 1, h, w): the first latent frame, which is given and never noisy."""


def initial_noise(shape: tuple[int, ...], *, seed: int, noise_device: str, device: torch.device) -> Tensor:
    """Return standard normal noise in float32 on ``device``, drawn on ``noise_device`` from a generator of its own.

    A CPU generator gives the same noise on every machine; a CUDA one gives the reference's noise on a GPU.
    """
    generator = torch.Generator(noise_device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=noise_device, dtype=torch.float32).to(device)


def chunks_of_images(first: Tensor, last: Tensor | None, *, frame_num: int, height: int, width: int) -> Iterator[Tensor]:
    """Yield a video of the images (3, any, any) in [-1, 1] at its ends and zeros, mid-grey, between, in the encoder's chunks.

    Chunks are (1, 3, n, H, W): the first frame, then four at a time, of which only one chunk exists at once. Images are scaled to the
    video's size, bicubic and without antialiasing, as in the reference.
    """

    def scaled(image: Tensor) -> Tensor:
        return F.interpolate(image.unsqueeze(0), size=(height, width), mode="bicubic").unsqueeze(2)

    yield scaled(first)
    grey = first.new_zeros(1, 3, 4, height, width)
    for start in range(1, frame_num, 4):
        is_end = start + 4 >= frame_num
        yield torch.cat([grey[:, :, :3], scaled(last)], dim=2) if is_end and last is not None else grey


def mask_of_images(latent_shape: tuple[int, int, int, int], *, has_last: bool) -> Tensor:
    """Return (1, 4, T, h, w): 1 where a frame is given. Channels are the frames of a latent frame; the first has one, four times."""
    _, num_latents, rows, columns = latent_shape
    mask = torch.zeros(1, 4, num_latents, rows, columns)
    mask[:, :, 0] = 1
    if has_last:
        mask[:, -1, -1] = 1
    return mask
