"""What the transformer is given beside the noisy latents."""

from dataclasses import dataclass

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
