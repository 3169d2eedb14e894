"""Transformers of other systems with the same shapes and random weights, for comparison."""

from collections.abc import Callable

import torch

from bench.random_model import random_inputs
from wan_dist.models.dims import TransformerDims
from wan_dist.tasks.base import Task


def diffusers_config(dims: TransformerDims) -> dict[str, int | None]:
    """Return the configuration of diffusers' transformer."""
    return {
        "num_attention_heads": dims.num_heads,
        "attention_head_dim": dims.head_dim,
        "in_channels": dims.in_dim,
        "out_channels": dims.out_dim,
        "ffn_dim": dims.ffn_dim,
        "num_layers": dims.num_layers,
        "image_dim": dims.image_dim or None,
        "added_kv_proj_dim": dims.dim if dims.image_dim else None,
        "pos_embed_seq_len": dims.image_positions or None,
    }


def diffusers_transformer(task: Task, device: torch.device) -> torch.nn.Module:
    """Return diffusers' transformer in bfloat16 with cuDNN attention."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**diffusers_config(task.transformer_dims)).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for module in model.modules():  # rotary tables are buffers, which to_empty leaves uninitialized
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(
                module,
                name,
                torch.randn_like(buffer, dtype=torch.float32).clamp(-1, 1).to(buffer.dtype),
            )
    model.set_attention_backend("_native_cudnn")
    return model


def diffusers_step(
    model: torch.nn.Module, task: Task, size: tuple[int, int], frames: int, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Return a function that computes a denoising step: both guidance passes, one after the other."""
    latents, _, conditioning = random_inputs(task, size, frames, device)
    if conditioning.extra_channels is not None:
        latents = torch.cat([latents, conditioning.extra_channels], dim=1)
    latents = latents.bfloat16()
    texts = [torch.randn(1, 512, 4096, device=device).bfloat16() for _ in range(2)]
    image = torch.randn(1, 257, 1280, device=device).bfloat16() if task.has_image_encoder else None
    timestep = torch.tensor([700], device=device)

    def step() -> torch.Tensor:
        out = [
            model(latents, timestep, text, encoder_hidden_states_image=image, return_dict=False)[0]
            for text in texts
        ]
        return out[1] + 5.0 * (out[0] - out[1])

    return step
