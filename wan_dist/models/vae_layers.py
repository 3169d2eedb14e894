"""Causal layers of the Wan video VAE, for one device.

Shapes: (B, C, F, H, W). Videos pass through in chunks of frames; what a layer must remember of earlier chunks is in a
`CausalCache` that the caller makes for each video and passes along. Names are those of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CausalCache = dict[nn.Module, Tensor | None]
"""For each causal layer the last frames of its input so far. Empty: the next chunk starts the video."""


class CausalConv3d(nn.Conv3d):
    """Convolution that sees the present and the past only: its padding in time is all in front."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        t, h, w = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, (t, h, w), padding=(0, h // 2, w // 2))
        self.num_past = t - 1

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:  # type: ignore[override]
        """Convolve a chunk of frames; the frames before the first one are zeros."""
        if self.num_past:
            past = cache.get(self)
            if past is None:
                past = x.new_zeros(*x.shape[:2], self.num_past, *x.shape[3:])
            x = torch.cat([past, x], dim=2)
            cache[self] = x[:, :, -self.num_past :].clone()  # a view would keep the whole chunk alive
        return super().forward(x)


class RMSNorm(nn.Module):
    """RMSNorm over channels, in float32."""

    def __init__(self, dim: int, num_trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * num_trailing))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) of any number of trailing dims -> the same shape."""
        scale = self.gamma.shape[0] ** 0.5
        return (F.normalize(x.float(), dim=1) * scale * self.gamma).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # dropout in training; the checkpoint's numbering counts it
            CausalConv3d(out_dim, out_dim, 3),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C_in, F, H, W) -> (B, C_out, F, H, W)."""
        out = x
        for layer in self.residual:
            out = layer(out, cache) if isinstance(layer, CausalConv3d) else layer(out)
        return out + (x if self.shortcut is None else self.shortcut(x, cache))


class AttentionBlock(nn.Module):
    """Self-attention with one head inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C, F, H, W) -> the same shape."""
        frames = x.transpose(1, 2).flatten(0, 1)  # (B F, C, H, W)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # (B F, H W, 3 C)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        out = self.proj(out.transpose(1, 2).unflatten(2, frames.shape[2:]))
        return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Module):
    """Double rows and columns, and frames too where ``temporal``."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F or 2 F, 2 H, 2 W); the video's first frame is never doubled."""
        if self.time_conv is not None:
            if self in cache:
                x = self.time_conv(x, cache).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
                x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:
                cache[self] = None  # the first frame was seen; time_conv starts after it
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve rows and columns, and frames too where ``temporal``."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C, F, H, W) -> (B, C, F or F / 2, H / 2, W / 2); the video's first frame stays one."""
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        if self.time_conv is None:
            return x
        past = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class DownStage(nn.Module):
    """Residual blocks and a downsampling beside a shortcut that averages (VAE 2.2)."""

    def __init__(self, layers: list[nn.Module], out_dim: int, *, temporal: int, spatial: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal, self.spatial = out_dim, temporal, spatial

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F / temporal, H / spatial, W / spatial)."""
        out = x
        for layer in self.downsamples:
            out = layer(out, cache)
        return out + average_down(x, self.out_dim, temporal=self.temporal, spatial=self.spatial)


class UpStage(nn.Module):
    """Residual blocks and an upsampling beside a shortcut that repeats (VAE 2.2)."""

    def __init__(self, layers: list[nn.Module], out_dim: int, *, temporal: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal = out_dim, temporal

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F * temporal, 2 H, 2 W); the video's first frame stays one."""
        is_first = self not in cache
        cache[self] = None
        out = x
        for layer in self.upsamples:
            out = layer(out, cache)
        repeated = repeat_up(x, self.out_dim, temporal=self.temporal)
        return out + (repeated[:, :, self.temporal - 1 :] if is_first else repeated)


def average_down(x: Tensor, out_dim: int, *, temporal: int, spatial: int) -> Tensor:
    """Move blocks of (temporal, spatial, spatial) neighbours into channels and average groups of those down to ``out_dim``.

    x (B, C, F, H, W); frames that do not fill a block are preceded by zeros.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % temporal, 0))
    for dim, factor in ((2, temporal), (4, spatial), (6, spatial)):
        x = x.unflatten(dim, (-1, factor))  # at last (B, C, F, ft, H, fh, W, fw)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def repeat_up(x: Tensor, out_dim: int, *, temporal: int) -> Tensor:
    """Repeat channels and move them into blocks of (temporal, 2, 2) neighbours, to ``out_dim`` channels; x (B, C, F, H, W)."""
    x = x.repeat_interleave(out_dim * temporal * 4 // x.shape[1], dim=1)
    x = x.unflatten(1, (out_dim, temporal, 2, 2))  # (B, C_out, ft, fh, fw, F, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def pixels_to_channels(video: Tensor) -> Tensor:
    """video (B, 3, F, H, W) -> (B, 12, F, H / 2, W / 2): each 2 x 2 block of pixels becomes channels, columns before rows."""
    x = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # (B, C, F, h, row, w, column)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def channels_to_pixels(x: Tensor) -> Tensor:
    """Undo `pixels_to_channels`."""
    x = x.unflatten(1, (-1, 2, 2))  # (B, C, column, row, F, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
