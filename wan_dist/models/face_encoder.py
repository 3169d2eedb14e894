"""Face encoder of Animate: frames of a face to a few vectors for each latent frame, once a clip.

A motion encoder describes each frame by a few directions of motion, a face encoder reduces these to one
latent frame for four frames, as the VAE does. Both are in float32. Layer names are those of the published
checkpoints.

Sources: the motion encoder is that of LIA (arXiv:2203.09043), of StyleGAN2's layers (arXiv:1912.04958); the
whole is Wan-Animate's (arXiv:2509.14055).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import FaceEncoderDims

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)
"""Along a side; the kernel is their outer product, divided by its sum."""
NUM_VECTORS = 5
"""Vectors of a latent frame: one of each head of the published models, and a learned one."""
_FRAMES_AT_ONCE = 4
"""Frames that the motion encoder computes at once; the number does not change the result."""


class ScaledConv(nn.Module):
    """Convolution without bias, whose weight is divided by the root of the number of its inputs."""

    def __init__(
        self, in_dim: int, out_dim: int, size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, size, size))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) -> (n, C', H', W')."""
        scale = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        return F.conv2d(x, self.weight * scale, stride=self.stride, padding=self.padding)


class ScaledLinear(nn.Linear):
    """Linear whose weight is divided by the root of the number of its inputs, and its bias not."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out)."""
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class BiasedActivation(nn.Module):
    """Bias of each channel, then a leaky ReLU that keeps the variance."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) -> the same shape."""
        return F.leaky_relu(x + self.bias.view(-1, 1, 1), 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Blur by the binomial kernel, with zeros around the image."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) -> (n, C, H + 2 padding - 3, W + 2 padding - 3)."""
        kernel = make_blur_kernel().to(x).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, padding=self.padding, groups=x.shape[1])


def make_blur_kernel() -> Tensor:
    """Return the kernel (4, 4) of `Blur`."""
    taps = torch.tensor(BLUR_TAPS)
    return torch.outer(taps, taps) / taps.sum() ** 2


class MotionBlock(nn.Module):
    """Residual block that halves height and width."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            ScaledConv(in_dim, in_dim, 3, padding=1), BiasedActivation(in_dim)
        )
        self.conv2 = nn.Sequential(
            Blur(2), ScaledConv(in_dim, out_dim, 3, stride=2), BiasedActivation(out_dim)
        )
        self.skip = nn.Sequential(Blur(1), ScaledConv(in_dim, out_dim, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) -> (n, C', H / 2, W / 2)."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class MotionDirections(nn.Module):
    """Orthonormal directions of motion, of which a frame is a sum."""

    def __init__(self, dims: FaceEncoderDims) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dims.feature_dim, dims.motion_dim))

    def forward(self, strengths: Tensor) -> Tensor:
        """Strengths (n, motion_dim) of the directions -> their sum (n, feature_dim).

        The directions' signs are those of Householder's QR decomposition; on the CPU, so that they are the
        same everywhere.
        """
        directions, _ = torch.linalg.qr(self.weight.cpu() + 1e-8)
        return strengths @ directions.T.to(strengths)


class MotionEncoder(nn.Module):
    """What a face does in each frame, apart from whose face it is."""

    def __init__(self, dims: FaceEncoderDims) -> None:
        super().__init__()
        width = dims.feature_dim
        convs = nn.ModuleList(
            [
                nn.Sequential(
                    ScaledConv(3, dims.channels[0], 1), BiasedActivation(dims.channels[0])
                ),
                *itertools.starmap(MotionBlock, itertools.pairwise(dims.channels)),
                ScaledConv(dims.channels[-1], width, 4),
            ]
        )
        linears = [ScaledLinear(width, width) for _ in range(dims.num_linears - 1)]
        self.enc = nn.ModuleDict(
            {
                "net_app": nn.ModuleDict({"convs": convs}),
                "fc": nn.Sequential(*linears, ScaledLinear(width, dims.motion_dim)),
            }
        )
        self.dec = nn.ModuleDict({"direction": MotionDirections(dims)})

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, S, S) in [-1, 1], S = `FaceEncoderDims.image_size` -> (n, feature_dim)."""
        x = frames
        for conv in self.enc.get_submodule("net_app.convs").children():
            x = conv(x)
        return self.dec["direction"](self.enc["fc"](x.flatten(1)))


class CausalConv(nn.Module):
    """Convolution over frames that looks back only; the first frame is repeated before the beginning."""

    def __init__(self, in_dim: int, out_dim: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, F, C) -> (n, ceil(F / stride), C')."""
        padded = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return self.conv(padded).transpose(1, 2)


class FaceEncoder(nn.Module):
    """Motion of frames to vectors of latent frames."""

    def __init__(self, dims: FaceEncoderDims) -> None:
        super().__init__()
        width = dims.hidden_dim
        self.num_heads = dims.num_heads
        self.conv1_local = CausalConv(dims.feature_dim, dims.num_heads * width)
        self.conv2 = CausalConv(width, width, stride=2)
        self.conv3 = CausalConv(width, width, stride=2)
        self.out_proj = nn.Linear(width, dims.out_dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dims.out_dim))

    def forward(self, motion: Tensor) -> Tensor:
        """Motion (4 n + 1, feature_dim) of frames -> (n + 1, heads + 1, D), the last of them learned."""
        heads = self.conv1_local(motion.unsqueeze(0)).unflatten(-1, (self.num_heads, -1))
        x = _activate(heads.squeeze(0).transpose(0, 1))  # (heads, F, width)
        x = _activate(self.conv3(_activate(self.conv2(x))))
        vectors = self.out_proj(x).transpose(0, 1)
        return torch.cat([vectors, self.padding_tokens[0].expand(len(vectors), -1, -1)], dim=1)


def _activate(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class FaceVideoEncoder(nn.Module):
    """Motion encoder and face encoder."""

    def __init__(self, dims: FaceEncoderDims) -> None:
        super().__init__()
        self.dims = dims
        self.motion_encoder = MotionEncoder(dims)
        self.face_encoder = FaceEncoder(dims)

    def encode_motion(self, frames: Tensor) -> Tensor:
        """Return the motion (n, feature_dim) of frames (n, 3, S, S), of any float type, in [-1, 1]."""
        device = next(self.parameters()).device
        return torch.cat(
            [
                self.motion_encoder(piece.to(device, torch.float32))
                for piece in frames.split(_FRAMES_AT_ONCE)
            ]
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (4 n + 1, 3, S, S) in [-1, 1] -> (n + 1, heads + 1, D), float32."""
        return self.face_encoder(self.encode_motion(frames))

    def encode_still_face(self, num_frames: int) -> Tensor:
        """Return the vectors of ``num_frames`` frames that are -1 everywhere: no face, for guidance."""
        size = self.dims.image_size
        motion = self.encode_motion(torch.full((1, 3, size, size), -1.0))
        return self.face_encoder(motion.expand(num_frames, -1))
