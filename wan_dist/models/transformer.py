"""Wan diffusion transformer for one device; its context, the prompt and images, is prepared in context.py.

Shapes: B batch, C channels, T h w latent frames, rows and columns, L tokens, D width, R rows of timestep
modulation (one for each segment of tokens that share a timestep, never one for each token). The residual
stream and the linears are in the run's dtype; norms, modulation, gates, rotary embedding, the timestep
branch and the head are float32. Layer names are those of the published checkpoints, except that q, k and v
are one linear.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.rotary import compute_rotary_tables
from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels.transformer_ops import (
    Scaling,
    layer_norm,
    split_by_segment,
)
from wan_dist.models.transformer_block import ContextKV, SelfAttention, TransformerBlock


@dataclass
class ResidualCache:
    """Cache of what all blocks together add to the tokens, for each context."""

    can_reuse: Callable[[Tensor], bool]
    """Whether a step, by its timestep embedding (B, R, 6, D), reuses the cached residuals."""
    residuals: list[Tensor] = field(default_factory=list)


class WholeSequence(nn.Module):
    """Sequence on one device, which is not split; sequence parallelism replaces this module."""

    def split(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[int, ...]]:
        """Return this device's shard of tokens x (B, L, D), rotary tables (L, 1, D / 2) and segments."""
        return x, rotary, segments

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens (B, L, C) from this device's shard of them."""
        return x


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

    def forward(self, x: Tensor, time: Tensor, segments: tuple[int, ...]) -> Tensor:
        """Return (B, L, patch volume * C), float32, of x (B, L, D).

        time (B, R, D) float32 has a row for each segment of tokens.
        """
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)

        def norm_slice(row: int, token_slice: slice) -> Tensor:
            scaling = Scaling(scale[:, row, None], shift[:, row, None])
            out = torch.empty_like(x[:, token_slice], dtype=torch.float32)
            return layer_norm(
                x[:, token_slice], scaling, (token_slice.stop - token_slice.start,), self.eps, out
            )

        return torch.cat(
            [
                self.head(norm_slice(row, token_slice))
                for row, token_slice in split_by_segment(segments)
            ],
            dim=1,
        )


class WanTransformer(nn.Module):
    """Diffusion transformer: predicts the velocity of noisy video latents for a prompt and images.

    Source: Wan technical report (arXiv:2503.20314).
    """

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.dtype = dtype
        inner_attention = inner_attention or InnerAttention()
        self.patch_embedding = PatchEmbedding(dims, dtype)
        self.time_embedding = nn.Sequential(
            nn.Linear(dims.freq_dim, dims.dim), nn.SiLU(), nn.Linear(dims.dim, dims.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dims.dim, 6 * dims.dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dims, dtype, InnerAttention(inner_attention.kernel, inner_attention.name)
            )
            for _ in range(dims.num_layers)
        )
        self.head = OutputHead(dims)
        self.sequence = WholeSequence()
        self.time_embeddings: dict[str, tuple[Tensor, Tensor]] = {}
        """What `embed_timesteps` returns for the timesteps of `precompute_time_embeddings`."""

    def set_slice_tokens(self, max_tokens: int | None) -> None:
        """Limit how many tokens go through the blocks' linears at once; None: all."""
        for block in self.blocks:
            cast(TransformerBlock, block).slice_tokens = max_tokens

    @property
    def self_attentions(self) -> Iterator[SelfAttention]:
        """Every block's self-attention, whose ``inner_attention`` may be wrapped."""
        return (cast(TransformerBlock, block).self_attn for block in self.blocks)

    def compute_rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary tables for latents (B, C, T, h, w), which are the same in all steps."""
        t, h, w = (
            size // patch for size, patch in zip(latents.shape[2:], self.dims.patch, strict=True)
        )
        return compute_rotary_tables((t, h, w), self.dims.head_dim, device=latents.device)

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, R, D) for the head and (B, R, 6, D) for the blocks, float32.

        timesteps (B, R) in [0, 1000], on the CPU.
        """
        if self.time_embeddings:
            return self.time_embeddings[str(timesteps.tolist())]
        num_frequencies = self.dims.freq_dim // 2
        timesteps = timesteps.to(self.head.head.weight.device)
        frequencies = 10000.0 ** (
            -torch.arange(num_frequencies, dtype=torch.float64, device=timesteps.device)
            / num_frequencies
        )
        angles = timesteps.double().unsqueeze(-1) * frequencies
        time_embedding = self.time_embedding(
            torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        )
        return time_embedding, self.time_projection(time_embedding).unflatten(
            -1, (6, self.dims.dim)
        )

    def precompute_time_embeddings(self, timesteps: Iterable[Tensor]) -> None:
        """Embed these timesteps (B, R) now, then delete the timestep layers.

        In float32 they are as large as a block. No other timesteps can be embedded after that.
        """
        self.time_embeddings = {
            str(timestep_rows.tolist()): self.embed_timesteps(timestep_rows)
            for timestep_rows in timesteps
        }
        del self.time_embedding, self.time_projection

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        contexts: Sequence[ContextKV],
        rotary: tuple[Tensor, Tensor],
        residual_cache: ResidualCache | None = None,
    ) -> list[Tensor]:
        """Return for each context the velocity (B, C_out, T, h, w), float32, of latents (B, C_in, T, h, w).

        timesteps (B, 1) on the CPU, or (B, 2) where the first latent frame has a timestep of its own, the
        first of the two. T, h, w must be multiples of the patch. ``contexts`` come from `ContextProjection`,
        ``rotary`` from `compute_rotary`. All contexts go through a block before the next block runs, so
        that its weights are gathered or fetched only once. With a ``residual_cache``, a step may reuse
        what the blocks added in an earlier step.
        """
        time, block_time = self.embed_timesteps(timesteps)
        x = self.patch_embedding(latents)
        num_tokens = x.shape[1]
        num_first_tokens = num_tokens // (latents.shape[2] // self.dims.patch[0])
        segments: tuple[int, ...] = (
            (num_tokens,)
            if timesteps.shape[1] == 1
            else (num_first_tokens, num_tokens - num_first_tokens)
        )
        x, rotary, segments = self.sequence.split(x, rotary, segments)
        if (
            residual_cache is not None
            and residual_cache.can_reuse(block_time)
            and residual_cache.residuals
        ):
            streams = [x + residual for residual in residual_cache.residuals]
        else:
            input_tokens = None
            if residual_cache is not None:
                residual_cache.residuals.clear()
                input_tokens = x.clone()
            streams = [x]
            del x
            for index, block in enumerate(self.blocks):
                streams = block(
                    streams,
                    block_time,
                    [context.select_block(index) for context in contexts],
                    rotary,
                    segments,
                )
            if residual_cache is not None and input_tokens is not None:
                residual_cache.residuals = [stream - input_tokens for stream in streams]
                del input_tokens
        return [
            self.unpatchify_tokens(
                self.sequence.gather(self.head(x, time, segments)), latents.shape[2:]
            )
            for x in streams
        ]

    def unpatchify_tokens(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, L, patch volume * C) -> (B, C, T, h, w) for ``size`` (T, h, w)."""
        token_grid = [length // patch for length, patch in zip(size, self.dims.patch, strict=True)]
        # (B, t, y, x, pt, py, px, C)
        x = x.unflatten(1, token_grid).unflatten(-1, (*self.dims.patch, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, *size)
