"""CLIP image encoder of Wan2.1's image tasks (transformers' modules)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan_dist.models.dims import ImageEncoderDims

# CLIP's normalisation of RGB in [0, 1] (openai/CLIP, clip.py).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_image_encoder(dims: ImageEncoderDims) -> nn.Module:
    """Return the vision tower in float32 up to the penultimate layer, whose output Wan uses."""
    config = CLIPVisionConfig(
        hidden_size=dims.dim,
        intermediate_size=dims.ffn_dim,
        num_hidden_layers=dims.num_layers - 1,
        num_attention_heads=dims.num_heads,
        patch_size=dims.patch,
        image_size=dims.image_size,
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config)
    # Releases of transformers differ in whether the tower is wrapped.
    tower = getattr(model, "vision_model", model)
    tower.post_layernorm = (
        nn.Identity()
    )  # only the pooled output, which is not used, goes through it
    # No checkpoint has this buffer, so it must hold its values even if the rest is built on meta.
    num_positions = (dims.image_size // dims.patch) ** 2 + 1
    tower.embeddings.position_ids = torch.arange(num_positions, device="cpu").unsqueeze(0)
    return tower


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
    return encoder(pixel_values=pixels.to(device)).last_hidden_state
