"""Control inputs of the Fun models: tokens of a reference image and of a moving camera, once a video.

These tokens do not depend on the denoising step. The layers that make them are part of `ContextProjection`,
which is freed before the transformer is loaded. Layer names are those of the published checkpoints.

Source: VideoX-Fun (aigc-apps/VideoX-Fun); the camera's rays are Plücker coordinates, as in CameraCtrl
(arXiv:2404.02101).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import TransformerDims

RAY_CHANNELS = 6 * 4
"""Channels of the adapter's input at a pixel: six of a ray, of each of the frames of a latent frame."""


@dataclass(frozen=True)
class ControlTokens:
    """Tokens that control a video, the same at all steps."""

    reference: Tensor | None = None
    """(1, n, D) of a reference image, which precede those of the video."""
    camera: Tensor | None = None
    """(1, L, D), added to the L tokens of the video."""

    @property
    def num_reference_tokens(self) -> int:
        """Tokens before those of the video."""
        return 0 if self.reference is None else self.reference.shape[1]

    def add_to(self, tokens: Tensor) -> Tensor:
        """Return all tokens (B, n + L, D) that the blocks compute; ``tokens`` (B, L, D) may be changed."""
        if self.camera is not None:
            tokens += self.camera
        if self.reference is None:
            return tokens
        return torch.cat([self.reference.expand(len(tokens), -1, -1), tokens], dim=1)


NO_CONTROL = ControlTokens()


class ReferenceEmbedding(nn.Conv2d):
    """Patch embedding of a reference image's latents."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        patch = dims.patch[1:]
        super().__init__(dims.ref_conv_in_dim, dims.dim, patch, stride=patch, dtype=dtype)

    def embed(self, latents: Tensor) -> Tensor:
        """latents (B, C, 1, h, w) -> tokens (B, n, D)."""
        tokens: Tensor = self(latents[:, :, 0].to(self.weight.dtype))
        return tokens.flatten(2).transpose(1, 2)


class CameraResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, added to their input."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, dtype=dtype)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, h, w) -> the same shape."""
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Tokens of a camera's rays: squares of pixels as channels, a patch embedding, a residual block."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        patch = dims.patch[1:]
        self.square = isqrt(dims.camera_in_dim // RAY_CHANNELS)
        self.conv = nn.Conv2d(dims.camera_in_dim, dims.dim, patch, stride=patch, dtype=dtype)
        self.residual_blocks = nn.ModuleList([CameraResidualBlock(dims.dim, dtype)])

    def embed(self, cameras: Tensor, size: Sequence[int]) -> Tensor:
        """Return the tokens (1, L, D) of cameras (F, 16), as of `compute_rays`, for latents of ``size``.

        ``size``: (T, h, w). A latent frame at a time, whose rays in float32 are as large as its video.
        """
        num_frames, rows, columns = size
        pixels = (rows * self.square, columns * self.square)
        return torch.cat(
            [self._embed_frame(stack_rays(cameras, index, pixels)) for index in range(num_frames)],
            dim=1,
        )

    def _embed_frame(self, rays: Tensor) -> Tensor:
        x = self.conv(F.pixel_unshuffle(rays.to(self.conv.weight.dtype), self.square))
        for block in self.residual_blocks:
            x = block(x)
        return torch.as_tensor(x).flatten(2).transpose(1, 2)


def stack_rays(cameras: Tensor, index: int, size: tuple[int, int]) -> Tensor:
    """Return the rays (1, 24, H, W) of latent frame ``index``: channel 4 c + s is c of its frame s.

    The first latent frame has a single one, four times. ``size``: (H, W).
    """
    frames = [max(0, 4 * index - 3 + position) for position in range(4)]
    return compute_rays(cameras[frames], size).transpose(0, 1).flatten(0, 1).unsqueeze(0)


def compute_rays(cameras: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the Plücker coordinates (n, 6, H, W) of the rays through all pixels: moment, then direction.

    cameras (n, 16), float32: focal lengths and centre in pixels (fx, fy, cx, cy), then the camera-to-world
    matrix (3, 4). ``size``: (H, W).
    """
    height, width = size
    fx, fy, cx, cy = (cameras[:, index, None, None] for index in range(4))
    poses = cameras[:, 4:].unflatten(1, (3, 4))
    x = (torch.arange(width, device=cameras.device) + 0.5 - cx) / fx  # (n, 1, W)
    y = (torch.arange(height, device=cameras.device)[:, None] + 0.5 - cy) / fy  # (n, H, 1)
    directions = torch.stack(torch.broadcast_tensors(x, y, torch.ones_like(x)), dim=-1)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions = directions.flatten(1, 2) @ poses[:, :, :3].transpose(1, 2)  # (n, H W, 3)
    origins = poses[:, None, :, 3].expand_as(directions)
    rays = torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)
    return rays.transpose(1, 2).unflatten(2, (height, width))
