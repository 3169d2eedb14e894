"""Vision tower of CLIP ViT-H/14 (arXiv:2103.00020) up to its penultimate layer, whose output Wan uses.

Shapes: B images, P patches, D width. Parameters have the names of the Transformers library. All is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import ImageEncoderDims
from wan_dist.models.umt5 import make_embedding


class ClipEmbeddings(nn.Module):
    """Patches, after a class token, with learned positions."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(dims.dim))
        self.patch_embedding = nn.Conv2d(3, dims.dim, dims.patch, stride=dims.patch, bias=False)
        self.position_embedding = make_embedding((dims.image_size // dims.patch) ** 2 + 1, dims.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, P + 1, D) of pixels (B, 3, H, W)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class ClipAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.k_proj = nn.Linear(dims.dim, dims.dim)
        self.v_proj = nn.Linear(dims.dim, dims.dim)
        self.q_proj = nn.Linear(dims.dim, dims.dim)
        self.out_proj = nn.Linear(dims.dim, dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P + 1, D) -> the same shape."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClipMlp(nn.Module):
    """Two linears with GELU between."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims.dim, dims.ffn_dim)
        self.fc2 = nn.Linear(dims.ffn_dim, dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P + 1, D) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class ClipLayer(nn.Module):
    """Norm and self-attention, norm and MLP, each with a residual."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.self_attn = ClipAttention(dims)
        self.layer_norm1 = nn.LayerNorm(dims.dim)
        self.mlp = ClipMlp(dims)
        self.layer_norm2 = nn.LayerNorm(dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P + 1, D) -> the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    """The layers in turn."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(dims) for _ in range(dims.num_layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P + 1, D) -> the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class ClipVision(nn.Module):
    """The tower: normalised pixels (B, 3, H, W) to features (B, P + 1, D), the class token first."""

    def __init__(self, dims: ImageEncoderDims) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(dims)
        self.pre_layrnorm = nn.LayerNorm(dims.dim)
        self.encoder = ClipEncoder(dims)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return features
