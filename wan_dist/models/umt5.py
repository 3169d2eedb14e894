"""umT5's encoder (arXiv:2304.09151), as the reference implementation computes it.

Shapes: B batch, n tokens, D width, H heads. Parameters have the names of the Transformers library. Norms and
the softmax are float32, the rest is in the model's dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import TextEncoderDims

_MAX_DISTANCE = 128
"""Distance from which on all tokens share a bucket of the position bias."""
_EPS = 1e-6


def make_embedding(num_rows: int, dim: int) -> nn.Embedding:
    """Return an embedding without drawn values: on the meta device, drawing takes an import of 1.2 s."""
    return nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim))


class RmsNorm(nn.Module):
    """Root mean square norm with a scale, without a mean and a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> the same shape."""
        variance = x.float().square().mean(dim=-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + _EPS)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention with a learned bias for each bucket of distances; scores are not scaled."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        inner_dim = dims.num_heads * dims.head_dim
        self.num_heads, self.num_buckets = dims.num_heads, dims.num_buckets
        self.q = nn.Linear(dims.dim, inner_dim, bias=False)
        self.k = nn.Linear(dims.dim, inner_dim, bias=False)
        self.v = nn.Linear(dims.dim, inner_dim, bias=False)
        self.o = nn.Linear(inner_dim, dims.dim, bias=False)
        self.relative_attention_bias = make_embedding(dims.num_buckets, dims.num_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, D) -> the same shape; mask (B, n) is false where there is padding."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        buckets = compute_distance_buckets(x.shape[1], self.num_buckets, x.device)
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) + bias
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(dim=-1).to(scores.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def compute_distance_buckets(num_tokens: int, num_buckets: int, device: torch.device) -> Tensor:
    """Return the bucket (n, n) of each key's distance from each query.

    Half of the buckets are for keys after the query. Of either half, the first half are single distances, the
    others grow with the logarithm of the distance (arXiv:1910.10683, section 2.1).
    """
    positions = torch.arange(num_tokens, device=device)
    offsets = positions.unsqueeze(0) - positions.unsqueeze(1)
    num_sided = num_buckets // 2
    num_single = num_sided // 2
    distances = offsets.abs()
    growth = torch.log(distances.float() / num_single) / math.log(_MAX_DISTANCE / num_single)
    # Of distance 0 the logarithm is infinite; it is a single one.
    far_buckets = num_single + (growth * (num_sided - num_single)).clamp_min(0).long()
    sided_buckets = torch.where(
        distances < num_single, distances, far_buckets.clamp_max(num_sided - 1)
    )
    return sided_buckets + (offsets > 0) * num_sided


class GatedFeedForward(nn.Module):
    """Linear, times GELU (in its tanh form) of another one, and a third."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dims.dim, dims.ffn_dim, bias=False)
        self.wi_1 = nn.Linear(dims.dim, dims.ffn_dim, bias=False)
        self.wo = nn.Linear(dims.ffn_dim, dims.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> the same shape."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class AttentionLayer(nn.Module):
    """Norm, self-attention and residual."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(dims)
        self.layer_norm = RmsNorm(dims.dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, D) -> the same shape; mask as in `SelfAttention`."""
        return x + self.SelfAttention(self.layer_norm(x), mask)


class FeedForwardLayer(nn.Module):
    """Norm, feed-forward and residual."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(dims)
        self.layer_norm = RmsNorm(dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> the same shape."""
        return x + self.DenseReluDense(self.layer_norm(x))


class Umt5Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(dims), FeedForwardLayer(dims)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, D) -> the same shape; mask as in `SelfAttention`."""
        attend, feed_forward = self.layer
        out: Tensor = feed_forward(attend(x, mask))
        return out


class Umt5Encoder(nn.Module):
    """The whole encoder."""

    def __init__(self, dims: TextEncoderDims) -> None:
        super().__init__()
        self.embed_tokens = make_embedding(dims.vocab_size, dims.dim)
        self.block = nn.ModuleList(Umt5Block(dims) for _ in range(dims.num_layers))
        self.final_layer_norm = RmsNorm(dims.dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids (B, n) -> embeddings (B, n, D); mask as in `SelfAttention`."""
        x = self.embed_tokens(ids)
        for block in self.block:
            x = block(x, mask)
        return self.final_layer_norm(x)
