"""Random transformer at full size, of a published model's shapes, and inputs for it; for timings."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.kernels.quantized_linear import QuantizedLinear, quantize_blocks, quantize_rows
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.tasks.base import Task

PROMPT_TOKENS = (60, 126)
"""Number of tokens of a prompt, and of the published negative prompt."""


def random_transformer(
    task: Task,
    attention: InnerAttention,
    device: torch.device,
    spread: Callable[[FusedTransformer], None] | None = None,
    quant: str = "none",
    trained_attention: str | None = None,
) -> FusedTransformer:
    """Return the task's transformer in bfloat16 with random weights that keep activations near 1.

    ``spread`` may parallelize it, while it is on the meta device. ``trained_attention``: sla, vsa, or
    None for dense attention.
    """
    dims = replace(
        task.transformer_dims,
        has_sla=trained_attention == "sla",
        has_vsa=trained_attention == "vsa",
    )
    with torch.device("meta"):
        model = build_transformer(dims, torch.bfloat16, attention)
        if quant != "none":
            quantize_blocks(model.layers().values(), quant)
    if spread is not None:
        spread(model)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() > 1 and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            local.normal_(std=parameter[0].numel() ** -0.5)
        else:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            in_dim = module.weight.shape[1] * (2 if module.quant == "int4" else 1)
            weight = torch.randn(module.weight.shape[0], in_dim, device=device) * in_dim**-0.5
            for part, value in quantize_rows(weight, module.quant).items():
                getattr(module, part).copy_(value)
    return model


def latent_shape(task: Task, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
    """Return (C, T, h, w) for a size in pixels, width first."""
    return (
        task.latent_channels,
        (frames - 1) // task.vae_stride[0] + 1,
        size[1] // task.vae_stride[1],
        size[0] // task.vae_stride[2],
    )


def random_inputs(
    task: Task, size: tuple[int, int], frames: int, device: torch.device
) -> tuple[torch.Tensor, list[ContextKV], Conditioning]:
    """Return latents, the contexts of both guidance passes, and the other conditioning.

    All of them are the same on all ranks.
    """
    torch.manual_seed(0)
    dims = task.transformer_dims
    shape = latent_shape(task, size, frames)

    def keys_values(tokens: int) -> torch.Tensor:
        return torch.randn(
            dims.num_layers + len(dims.vace_layers),
            2,
            1,
            tokens,
            dims.num_heads,
            dims.head_dim,
            device=device,
            dtype=torch.bfloat16,
        )

    image = keys_values(257 * (1 + bool(dims.image_positions))) if task.has_image_encoder else None
    extra = dims.in_dim - dims.out_dim + dims.vace_in_dim
    extra_channels, known_latents = None, None
    if extra:
        extra_channels = torch.randn(1, extra, *shape[1:], device=device)
    if task.inputs.has_known_first_frame:
        known_latents = torch.randn(1, shape[0], 1, *shape[2:], device=device)
    conditioning = Conditioning(
        context=torch.empty(0),
        negative_context=None,
        extra_channels=extra_channels,
        known_latents=known_latents,
    )
    return (
        torch.randn(1, *shape, device=device),
        [ContextKV(keys_values(tokens + 1), image) for tokens in PROMPT_TOKENS],
        conditioning,
    )
