"""CLIP image encoder of Wan2.1's image tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.clip import ClipVision
from wan_dist.models.dims import ImageEncoderDims

# CLIP's normalisation of RGB in [0, 1] (openai/CLIP, clip.py).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_image_encoder(dims: ImageEncoderDims) -> nn.Module:
    """Return the vision tower, without values where the default device is meta."""
    return ClipVision(dims)


def encode_images(encoder: nn.Module, images: list[Tensor], *, image_size: int) -> Tensor:
    """Return the features (n, 257, dim), class token first, of images (3, H, W) in [-1, 1] of any size.

    Each is resized, bicubic and without antialiasing, to ``image_size`` squared: as in the reference, its
    aspect ratio is not preserved.
    """
    device = next(encoder.parameters()).device
    resized_images = torch.cat(
        [
            F.interpolate(
                image.unsqueeze(0),
                size=(image_size, image_size),
                mode="bicubic",
                align_corners=False,
            )
            for image in images
        ]
    )
    mean, std = (
        resized_images.new_tensor(channel_values).view(1, 3, 1, 1)
        for channel_values in (_CLIP_MEAN, _CLIP_STD)
    )
    pixels = (resized_images * 0.5 + 0.5 - mean) / std
    features: Tensor = encoder(pixels.to(device))
    return features
