"""Wan video VAE in plain, differentiable PyTorch: what `WanVae` computes, of a whole video at once.

Functions of the parameters of `WanVae`, which computes the same in chunks of frames and in place.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from wan_dist.models.vae.model import WanVae
from wan_dist.models.vae.ops import rms_norm


def encode_moments(vae: WanVae, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance (B, C, T, h, w) of the latents of videos (B, 3, 4 T - 3, H, W).

    Both are float32 and not normalised.
    """
    encoder = vae.encoder
    x = _apply_layers([*encoder.downsamples, *encoder.middle], _convolve(encoder.conv1, video))
    mean, log_variance = _convolve(vae.conv1, _apply_head(encoder.head, x)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def decode_latents(vae: WanVae, latents: Tensor) -> Tensor:
    """Return the frames (B, 3, 4 T - 3, H, W), float32, of unnormalised latents (B, C, T, h, w)."""
    decoder = vae.decoder
    x = _apply_layers(
        [*decoder.middle, *decoder.upsamples],
        _convolve(decoder.conv1, _convolve(vae.conv2, latents)),
    )
    return _apply_head(decoder.head, x).float()


def _apply_layers(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        match layer:
            case ResidualBlock():
                x = _apply_residual(layer, x)
            case AttentionBlock():
                x = _apply_attention(layer, x)
            case Downsample():
                x = _downsample(layer, x)
            case Upsample():
                x = _upsample(layer, x)
    return x


def _convolve(conv: CausalConv3d, x: Tensor) -> Tensor:
    return F.conv3d(
        F.pad(x, (0, 0, 0, 0, conv.num_past_frames, 0)),
        conv.weight,
        conv.bias,
        padding=cast(tuple[int, int, int], conv.padding),
    )


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(rms_norm(x, cast(RMSNorm, norm).gamma)).to(x.dtype)


def _apply_head(head: nn.ModuleList, x: Tensor) -> Tensor:
    norm, _, conv = head
    return _convolve(cast(CausalConv3d, conv), _activate(norm, x))


def _apply_residual(block: ResidualBlock, x: Tensor) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    out = _convolve(cast(CausalConv3d, conv1), _activate(norm1, x))
    out = _convolve(cast(CausalConv3d, conv2), _activate(norm2, out))
    return out + (x if block.shortcut is None else _convolve(block.shortcut, x))


def _apply_attention(block: AttentionBlock, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)  # (B F, C, H, W)
    q, k, v = (
        part.flatten(2).transpose(1, 2) for part in block.to_qkv(block.norm(frames)).chunk(3, dim=1)
    )
    out = (
        F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
        .squeeze(1)
        .transpose(1, 2)
    )
    out = block.proj(out.reshape(frames.shape))
    return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _apply_to_frames(module: nn.Module, x: Tensor) -> Tensor:
    return (
        cast(Tensor, module(x.transpose(1, 2).flatten(0, 1)))
        .unflatten(0, (x.shape[0], -1))
        .transpose(1, 2)
    )


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    x = _apply_to_frames(layer.resample, x)
    if layer.time_conv is None:
        return x
    # The first frame is not merged with others.
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    if layer.time_conv is not None and x.shape[2] > 1:  # the first frame is never doubled
        doubled = _convolve(layer.time_conv, x[:, :, 1:]).unflatten(
            1, (2, -1)
        )  # (B, 2, C, F, H, W)
        x = torch.cat([x[:, :, :1], doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    return _apply_to_frames(layer.resample, x)
