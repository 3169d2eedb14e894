"""Wan diffusion transformer in plain, differentiable PyTorch: the specification, and what the toy trains.

Pipelines run `FusedTransformer` (fused_transformer.py): the same modules and parameters, computed in place,
in slices and by fused kernels; tests/unit/models/test_transformer.py compares the two.

Shapes: B batch, C channels, T h w latent frames, rows and columns, L tokens, D width, H heads, R timesteps of
a video. The residual stream and the linears are in the run's dtype; norms, modulation, gates, rotary
embedding, the timestep branch and the head are float32. Layer names are those of the published checkpoints,
except that q, k and v are one linear.

Source: Wan technical report (arXiv:2503.20314); adaptive norms as in DiT (arXiv:2212.09748).
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.rotary import apply_rotary, compute_rotary_tables
from wan_dist.models.dims import TransformerDims


class RMSNorm(nn.Module):
    """Root mean square norm over the whole width (arXiv:1910.07467), in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> the same shape, float32."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Attention between all tokens, with RMSNorm over the whole width of q and k, and rotary embedding."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.eps = dims.eps
        self.qkv = nn.Linear(dims.dim, 3 * dims.dim, dtype=dtype)
        self.o = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_q = RMSNorm(dims.dim, dims.eps)
        self.norm_k = RMSNorm(dims.dim, dims.eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, L, D), rotary tables (L, 1, D / 2H) -> (B, L, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (
            apply_rotary(split_heads(norm(projection), self.num_heads), rotary).to(v.dtype)
            for norm, projection in ((self.norm_q, q), (self.norm_k, k))
        )
        return cast(Tensor, self.o(attend(q, k, split_heads(v, self.num_heads))))


class CrossAttention(nn.Module):
    """Attention from the video's tokens to a text and images; k and v come from `ContextProjection`."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.text_len = dims.text_len
        self.eps = dims.eps
        self.q = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.o = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_q = RMSNorm(dims.dim, dims.eps)

    def forward(self, x: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """x (B, L, D) -> (B, L, D); kv: k and v (B, n, H, D / H) of the text, then those of images if any.

        Text and images have a softmax each; their results are added.
        """
        q = split_heads(self.norm_q(self.q(x)).to(kv[0].dtype), self.num_heads)
        out = attend(q, kv[0], kv[1])
        if len(kv) > 2:
            out = out + attend(q, kv[2], kv[3])
        return cast(Tensor, self.o(out))


class FeedForward(nn.Sequential):
    """Two linears with a GELU between them, by its tanh approximation."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__(
            nn.Linear(dims.dim, dims.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dims.ffn_dim, dims.dim, dtype=dtype),
        )


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to the residual stream."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = dims.eps
        self.self_attn = SelfAttention(dims, dtype)
        self.cross_attn = CrossAttention(dims, dtype)
        self.norm3 = nn.LayerNorm(dims.dim, dims.eps)
        self.ffn = FeedForward(dims, dtype)
        self.modulation = nn.Parameter(torch.zeros(1, 6, dims.dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x (B, L, D), time (B, L, 6, D) float32 of each token's timestep -> (B, L, D)."""
        modulation = (self.modulation + time).unbind(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        normed = modulate(x, shift, scale, self.eps).to(x.dtype)
        x = add_gated(x, self.self_attn(normed, rotary), gate)
        x = x + self.cross_attn(self.norm3(x.float()).to(x.dtype), context)
        normed = modulate(x, ffn_shift, ffn_scale, self.eps).to(x.dtype)
        return add_gated(x, self.ffn(normed), ffn_gate)


class PatchEmbedding(nn.Module):
    """Patch embedding of latents: a convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch = dims.patch
        self.weight = nn.Parameter(torch.zeros(dims.dim, dims.in_dim, *dims.patch, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dims.dim, dtype=dtype))

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, T, h, w) -> tokens (B, L, D)."""
        for dim, size in zip((2, 4, 6), self.patch, strict=True):
            latents = latents.unflatten(dim, (-1, size))
        # (B, L, C * patch volume)
        patches = latents.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class OutputHead(nn.Module):
    """Output norm and linear, in float32, since their rounding errors go directly into the latents."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__()
        self.eps = dims.eps
        self.head = nn.Linear(dims.dim, math.prod(dims.patch) * dims.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dims.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, L, D) float32 -> (B, L, patch volume * C) float32."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return cast(Tensor, self.head(modulate(x, shift, scale, self.eps)))


class TimeEmbedding(nn.Sequential):
    """Embedding of timesteps: cosine and sine waves, then two linears with a SiLU between them."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__(
            nn.Linear(dims.freq_dim, dims.dim), nn.SiLU(), nn.Linear(dims.dim, dims.dim)
        )
        self.num_frequencies = dims.freq_dim // 2

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (B, R) in [0, 1000] -> (B, R, D), float32."""
        exponents = torch.arange(self.num_frequencies, dtype=torch.float64, device=timesteps.device)
        angles = timesteps.double().unsqueeze(-1) * 10000.0 ** (-exponents / self.num_frequencies)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        return cast(Tensor, super().forward(waves))


class TimeProjection(nn.Sequential):
    """Projection of timestep embeddings to the blocks' modulation: a linear of their activations' sum."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dims.dim, 6 * dims.dim))

    def forward(self, embedding: Tensor, next_embedding: Tensor | None = None) -> Tensor:
        """Embeddings (B, R, D) -> (B, R, 6, D)."""
        activation, linear = self
        activated = activation(embedding)
        if next_embedding is not None:
            activated = activated + activation(next_embedding)
        return cast(Tensor, linear(activated).unflatten(-1, (6, -1)))


class WanTransformer(nn.Module):
    """Predicts the velocity of noisy video latents for a prompt and images."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.dims = dims
        self.dtype = dtype
        self.patch_embedding = PatchEmbedding(dims, dtype)
        self.time_embedding = TimeEmbedding(dims)
        if dims.takes_next_timestep:
            self.time_embedding_r = TimeEmbedding(dims)
        self.time_projection = TimeProjection(dims)
        self.blocks = nn.ModuleList(TransformerBlock(dims, dtype) for _ in range(dims.num_layers))
        self.head = OutputHead(dims)

    def compute_rotary(
        self, latents: Tensor, num_reference_frames: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary tables for latents (B, C, T, h, w), which are the same in all steps.

        Reference frames, of the latents' size, precede them.
        """
        t, h, w = (
            size // patch for size, patch in zip(latents.shape[2:], self.dims.patch, strict=True)
        )
        grid = (num_reference_frames + t, h, w)
        return compute_rotary_tables(grid, self.dims.head_dim, device=latents.device)

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, R, D) for the head and (B, R, 6, D) for the blocks, float32.

        timesteps (B, R) in [0, 1000]; (B, R, 2), each with the timestep of the step that follows, 0 at the
        last one, for a model that takes it. The head is not told the latter.
        """
        timesteps = timesteps.to(self.head.head.weight.device)
        if not self.dims.takes_next_timestep:
            embedding = self.time_embedding(timesteps)
            return embedding, self.time_projection(embedding)
        timesteps, next_timesteps = timesteps.unbind(-1)
        embedding = self.time_embedding(timesteps)
        return embedding, self.time_projection(embedding, self.time_embedding_r(next_timesteps))

    def count_segment_tokens(
        self, latents: Tensor, num_timesteps: int, num_reference_tokens: int = 0
    ) -> tuple[int, ...]:
        """Return how many tokens of latents (B, C, T, h, w) each timestep is for.

        One is for all tokens; of two, the first is for the first latent frame; of three, it is for the
        reference tokens, which precede those of the latents.
        """
        t, h, w = (
            size // patch for size, patch in zip(latents.shape[2:], self.dims.patch, strict=True)
        )
        if num_timesteps == 1:
            return (num_reference_tokens + t * h * w,)
        frame_segments = (h * w, (t - 1) * h * w)
        return frame_segments if num_timesteps == 2 else (num_reference_tokens, *frame_segments)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        contexts: Sequence[tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the velocity (B, C_out, T, h, w), float32, of latents (B, C_in, T, h, w).

        timesteps (B, R) or (B, R, 2): see `count_segment_tokens` and `embed_timesteps`. ``contexts``: each
        block's k and v, see `ContextKV.select_block`; ``rotary`` from `compute_rotary`. T, h, w are multiples
        of the patch.
        """
        time, block_time = self.embed_timesteps(timesteps)
        segments = self.count_segment_tokens(latents, timesteps.shape[1])
        block_time = repeat_rows(block_time, segments)  # (B, L, 6, D)
        x = self.patch_embedding(latents).to(self.dtype)  # another one under autocast
        for block, context in zip(self.blocks, contexts, strict=True):
            x = block(x, block_time, context, rotary)
        out = self.head(x, repeat_rows(time, segments))
        return self.unpatchify_tokens(out, latents.shape[2:])

    def unpatchify_tokens(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, L, patch volume * C) -> (B, C, T, h, w) for ``size`` (T, h, w)."""
        token_grid = [length // patch for length, patch in zip(size, self.dims.patch, strict=True)]
        # (B, t, y, x, pt, py, px, C)
        x = x.unflatten(1, token_grid).unflatten(-1, (*self.dims.patch, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, *size)


def repeat_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return rows (B, R, ...), each as often as ``counts`` says: (B, L, ...)."""
    repeated = [
        row.unsqueeze(1).expand(-1, count, *row.shape[1:])
        for row, count in zip(rows.unbind(1), counts, strict=True)
    ]
    return torch.cat(repeated, dim=1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """x (B, L, D) -> (B, L, H, D / H)."""
    return x.unflatten(-1, (num_heads, -1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: q (B, L, H, D / H), k and v (B, n, H, D / H) -> (B, L, D)."""
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return heads.transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (B, L, D) without weights, times 1 + scale, plus shift: float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * y, computed in float32, in x's dtype."""
    return (x.float() + gate * y.float()).to(x.dtype)
