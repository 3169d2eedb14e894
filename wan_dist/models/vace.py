"""VACE: a side branch of blocks that steers the transformer by a masked video and reference images.

The branch starts from the noisy video's tokens and those of the VACE context, an input of its own; what
each of its blocks projects out is added to the output of one of the transformer's blocks.

Source: VACE, All-in-One Video Creation and Editing (arXiv:2503.07598); names are those of the published
checkpoints.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import FusedBlock
from wan_dist.models.fused_transformer import BlockInputs, FusedTransformer
from wan_dist.models.kernels.transformer_ops import split_by_length
from wan_dist.models.transformer import PatchEmbedding


class VaceBlock(FusedBlock):
    """Block of the side branch; the first one also takes in the tokens of the VACE context."""

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention,
        *,
        is_first: bool,
    ) -> None:
        super().__init__(dims, dtype, inner_attention)
        self.before_proj = nn.Linear(dims.dim, dims.dim, dtype=dtype) if is_first else None
        self.after_proj = nn.Linear(dims.dim, dims.dim, dtype=dtype)

    def forward(  # type: ignore[override]  # streams of two kinds
        self,
        vace_streams: list[Tensor],
        streams: Sequence[Tensor],
        scale: float,
        vace_tokens: Tensor | None,
        time: Tensor,
        contexts: Sequence[tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, ...],
    ) -> list[Tensor]:
        """Return the branch's residual streams; ``scale`` times their projection is added to ``streams``.

        Both are changed in place. ``vace_tokens`` (B, L, D) of the VACE context are for the first block.
        For the other arguments see `FusedBlock.forward`.
        """
        token_slices = [
            token_slice for token_slice, _ in split_by_length(segments, self.slice_tokens)
        ]
        if self.before_proj is not None and vace_tokens is not None:
            for token_slice in token_slices:
                vace_streams[0][:, token_slice] += self.before_proj(vace_tokens[:, token_slice])
            del vace_tokens
        vace_streams = super().forward(vace_streams, time, contexts, rotary, segments)
        for stream, vace_stream in zip(streams, vace_streams, strict=True):
            for token_slice in token_slices:
                stream[:, token_slice].add_(
                    self.after_proj(vace_stream[:, token_slice]), alpha=scale
                )
        return vace_streams


class VaceTransformer(FusedTransformer):
    """`FusedTransformer` with VACE's side branch, whose input are the last channels of the latents."""

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention | None = None,
    ) -> None:
        super().__init__(dims, dtype, inner_attention)
        inner_attention = inner_attention or InnerAttention()
        self.vace_patch_embedding = PatchEmbedding(replace(dims, in_dim=dims.vace_in_dim), dtype)
        self.vace_blocks = nn.ModuleList(
            VaceBlock(
                dims,
                dtype,
                inner_attention.copy(),
                is_first=index == 0,
            )
            for index in range(len(dims.vace_layers))
        )
        self.context_scale = 1.0
        """Factor of what the side branch adds."""

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of latents (B, C_in + C_vace, T, h, w) without the VACE context."""
        return super().embed_latents(latents[:, : self.dims.in_dim])

    def run_blocks(
        self, streams: list[Tensor], inputs: BlockInputs, latents: Tensor
    ) -> list[Tensor]:
        """See `FusedTransformer.run_blocks`; a block of the branch runs after the one that it adds to."""
        vace_streams = [streams[0].clone()]
        for index, block in enumerate(self.layers().values()):
            if isinstance(block, VaceBlock):
                is_first = block is self.vace_blocks[0]
                vace_tokens = self._embed_vace_context(latents) if is_first else None
                vace_streams = block(
                    vace_streams,
                    streams,
                    self.context_scale,
                    vace_tokens,
                    *inputs.select_block(index),
                )
                del vace_tokens
            else:
                streams = block(streams, *inputs.select_block(index))
        return streams

    def _embed_vace_context(self, latents: Tensor) -> Tensor:
        """Return this device's tokens (B, n, D) of the VACE context."""
        tokens = self.vace_patch_embedding(latents[:, self.dims.in_dim :])
        rotary = self.compute_rotary(latents)
        own_tokens, _, _ = self.sequence.split(tokens, rotary, (tokens.shape[1],))
        return own_tokens
