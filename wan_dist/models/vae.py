"""The Wan2.1 video VAE: 4 x 8 x 8 compression, causal in time, decoded and encoded in chunks of frames."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_dist.models.vae_layers import (
    AttentionBlock,
    CausalCache,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
)

# Mean and standard deviation of each latent channel over the training data, from the published Diffusers-layout vae/config.json.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, kw_only=True)
class VaeDims:
    """Hyperparameters, as read off a checkpoint."""

    dim: int
    latent_dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    """Which of the encoder's downsamplings halve the frames too; the decoder's doublings mirror it."""


class Encoder(nn.Module):
    """Frames to latent moments."""

    def __init__(self, dims: VaeDims) -> None:
        super().__init__()
        widths = [dims.dim * multiplier for multiplier in (1, *dims.multipliers)]
        self.conv1 = CausalConv3d(3, widths[0], 3)
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(itertools.pairwise(widths)):
            layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(dims.num_blocks)]
            if stage < len(dims.temporal):
                layers.append(Downsample(out_dim, temporal=dims.temporal[stage]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * dims.latent_dim)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Encode a chunk (B, 3, F, H, W) -> (B, 2 C, f, H / 8, W / 8); f = 1 for the video's first frame, F / 4 afterwards."""
        x = self.conv1(x, cache)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, cache)
        return _apply_head(self.head, x, cache)


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, dims: VaeDims) -> None:
        super().__init__()
        widths = [dims.dim * multiplier for multiplier in (dims.multipliers[-1], *reversed(dims.multipliers))]
        self.conv1 = CausalConv3d(dims.latent_dim, widths[0], 3)
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(itertools.pairwise(widths)):
            in_dim = in_dim // 2 if stage else in_dim  # every upsampling before halved the channels
            layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(dims.num_blocks + 1)]
            if stage < len(dims.temporal):
                layers.append(Upsample(out_dim, temporal=dims.temporal[::-1][stage]))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], 3)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Decode a chunk (B, C, f, h, w) -> (B, 3, F, 8 h, 8 w); F = 1 for the video's first latent frame, 4 f afterwards."""
        x = self.conv1(x, cache)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, cache)
        return _apply_head(self.head, x, cache)


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def _head(in_dim: int, out_dim: int) -> nn.ModuleList:
    return nn.ModuleList([RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3)])


def _apply_head(head: nn.ModuleList, x: Tensor, cache: CausalCache) -> Tensor:
    norm, activation, conv = head
    return conv(activation(norm(x)), cache)


class WanVae(nn.Module):
    """Encoder and decoder; latents are normalised channel by channel to the scale the transformer was trained on."""

    def __init__(self, dims: VaeDims) -> None:
        super().__init__()
        self.dims = dims
        self.encoder = Encoder(dims)
        self.conv1 = CausalConv3d(2 * dims.latent_dim, 2 * dims.latent_dim, 1)
        self.conv2 = CausalConv3d(dims.latent_dim, dims.latent_dim, 1)
        self.decoder = Decoder(dims)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return like.new_tensor(LATENT_MEAN).view(shape), like.new_tensor(LATENT_STD).view(shape)

    def encode(self, video: Tensor) -> Tensor:
        """Return the normalised mean latents (B, C, T, H / 8, W / 8), T = (F - 1) / 4 + 1, of video (B, 3, F, H, W) in [-1, 1].

        F must be 4n + 1, H and W multiples of 8. Frames go through in chunks of 1, 4, 4, ...
        """
        cache: CausalCache = {}
        first, rest = video[:, :, :1], video[:, :, 1:]
        chunks = [self.encoder(chunk, cache) for chunk in (first, *rest.split(4, dim=2)) if chunk.shape[2]]
        mean_latents = self.conv1(torch.cat(chunks, dim=2), cache).chunk(2, dim=1)[0]
        mean, std = self._moments(mean_latents)
        return (mean_latents - mean) / std

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the frames (B, 3, n, 8 h, 8 w) in [-1, 1] of each latent frame in turn: n is 1 for the first, 4 for the others.

        latents (B, C, T, h, w), normalised. Memory does not grow with T.
        """
        cache: CausalCache = {}
        mean, std = self._moments(latents)
        for latent in latents.split(1, dim=2):
            yield self.decoder(self.conv2(latent * std + mean, cache), cache).clamp(-1, 1)
