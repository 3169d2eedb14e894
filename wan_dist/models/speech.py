"""Speech to video: a transformer that is shown audio, a reference image and the frames before a clip.

The sequence is the noisy video, then the reference image, then the history, coarser the older it is. Only the
video is noisy: the other tokens have timestep 0. Audio is added to each noisy token after some of the blocks,
from its own latent frame alone, so that a rank needs no tokens of others for it.

Source: Wan-S2V (arXiv:2508.18621); the history as in FramePack (arXiv:2504.12626).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.cross import cross_attend
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.rotary import compute_rotary_at
from wan_dist.models.audio_projection import AudioContext
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import FusedBlock, RowSliceLinear
from wan_dist.models.fused_transformer import BlockInputs, FusedTransformer
from wan_dist.models.kernels.transformer_ops import (
    Scaling,
    layer_norm,
    make_output_buffer,
    norm_and_rotate,
    split_by_length,
    split_by_segment,
)
from wan_dist.models.transformer import PatchEmbedding, RMSNorm

_ADAPTIVE_EPS = 1e-5
"""Of the norm before audio's cross-attention; 1e-6 elsewhere."""
_REFERENCE_FRAME = 30
"""Position of the reference image among the frames."""
_HISTORY_FRAMES = ((-1,), (-3,), (-19, -14, -9, -4))
"""Positions of the history's latent frames: the newest one, two as one, and 16 as four."""
_HISTORY_LENGTHS = (16, 2, 1)
"""Latent frames of the history's parts, oldest first."""


@dataclass(frozen=True)
class ClipInputs:
    """Latents that the transformer is shown beside the noisy ones, the same in all steps of a clip."""

    reference: Tensor
    """(1, C, 1, h, w) of the reference image."""
    history: Tensor | None = None
    """(1, C, 19, h, w) of the frames before the clip, oldest first; None: there are none."""
    pose: Tensor | None = None
    """(1, C, T, h, w) of a pose video."""


class AudioAttention(nn.Module):
    """Cross-attention from a latent frame's tokens to its audio, after a norm that audio modulates."""

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__()
        self.num_heads, self.eps = dims.num_heads, dims.eps
        self.q = RowSliceLinear(dims.dim, dims.dim, dtype=dtype)
        self.o = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_q = RMSNorm(dims.dim, dims.eps)
        self.inner_attention = inner_attention

    def forward(self, x: Tensor, context: AudioContext, frame: int) -> Tensor:
        """Return what is added to tokens x (B, n, D) of latent frame ``frame``, the same shape."""
        scale, shift = context.modulation[:, :, frame, None, None].unbind(0)  # (B, 1, 1, D)
        buffer = make_output_buffer(x, as_fp8=self.q.accepts_fp8_tokens)
        normed = layer_norm(x, Scaling(scale, shift), (x.shape[1],), _ADAPTIVE_EPS, buffer)
        q = self.q(normed).unflatten(-1, (self.num_heads, -1))
        norm_and_rotate(q, self.norm_q.weight, self.eps, None, q)
        kv = context.keys_values[:, :, frame].unbind(0)
        return cast(
            Tensor, self.o(cross_attend(self.inner_attention, q, kv, kv[0].shape[1]).flatten(2))
        )


class AudioBlock(FusedBlock):
    """Transformer block that adds audio to the noisy tokens after all else."""

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention,
        injector_index: int,
    ) -> None:
        super().__init__(dims, dtype, inner_attention)
        self.injector_index = injector_index
        # By its index among the injections, which its name in checkpoints has.
        self.injectors = nn.ModuleDict(
            {str(injector_index): AudioAttention(dims, dtype, inner_attention.copy())}
        )

    def forward(  # type: ignore[override]  # audio besides
        self,
        streams: list[Tensor],
        audio: Sequence[AudioContext],
        frame_segments: tuple[int, ...],
        time: Tensor,
        contexts: Sequence[tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, ...],
    ) -> list[Tensor]:
        """See `FusedBlock.forward`; ``audio`` is for each context.

        ``frame_segments``: how many of this device's tokens are of each latent frame of the video.
        """
        streams = super().forward(streams, time, contexts, rotary, segments)
        attention = self.injectors[str(self.injector_index)]
        for x, context in zip(streams, audio, strict=True):
            for token_slice, slice_segments in split_by_length(frame_segments, self.slice_tokens):
                for frame, run in split_by_segment(slice_segments):
                    tokens = x[:, token_slice][:, run]
                    tokens += attention(tokens, context, frame)
        return streams


class FramePacker(nn.Module):
    """Patch embeddings of the history, with larger patches the older it is."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        frames, rows, columns = dims.patch
        self.proj, self.proj_2x, self.proj_4x = (
            PatchEmbedding(
                replace(dims, patch=(frames * factor, rows * factor, columns * factor)), dtype
            )
            for factor in (1, 2, 4)
        )

    def forward(self, history: Tensor) -> Tensor:
        """history (B, C, 19, h, w) -> tokens (B, n, D), the newest first."""
        oldest, older, newest = history.split(_HISTORY_LENGTHS, dim=2)
        return torch.cat([self.proj(newest), self.proj_2x(older), self.proj_4x(oldest)], dim=1)


class SpeechTransformer(FusedTransformer):
    """`FusedTransformer` with audio, a reference image and history; ``clip_inputs`` must be set."""

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention | None = None,
    ) -> None:
        super().__init__(dims, dtype, inner_attention)
        inner_attention = inner_attention or InnerAttention()
        for injector_index, layer in enumerate(dims.audio_layers):
            self.blocks[layer] = AudioBlock(
                dims,
                dtype,
                inner_attention.copy(),
                injector_index,
            )
        self.cond_encoder = PatchEmbedding(dims, dtype)
        self.frame_packer = FramePacker(dims, dtype)
        self.trainable_cond_mask = nn.Embedding(3, dims.dim, dtype=dtype)
        self.clip_inputs: ClipInputs | None = None
        """What is shown beside the noisy latents."""

    @property
    def _inputs(self) -> ClipInputs:
        assert self.clip_inputs is not None
        return self.clip_inputs

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of two rows for timesteps (B, 1): of the noisy tokens, and 0 of the others."""
        if not self.time_embeddings:
            timesteps = F.pad(timesteps, (0, 1))
        return super().embed_timesteps(timesteps)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of latents (B, C, T, h, w), the reference image and the history."""
        inputs, pose = self._inputs, self._inputs.pose
        # Through the layers' forward alone, which gathers their weights where these are sharded.
        kinds = self.trainable_cond_mask(torch.arange(3, device=latents.device))
        if pose is None:  # one patch of zeros, for all tokens
            pose = latents.new_zeros(1, latents.shape[1], *self.dims.patch)
        noisy = self.patch_embedding(latents)
        noisy += self.cond_encoder(pose)
        parts = [noisy, self.patch_embedding(inputs.reference)]
        if inputs.history is not None:
            parts.append(self.frame_packer(inputs.history))
        for part, kind in zip(parts, kinds, strict=False):
            part += kind
        return torch.cat(parts, dim=1)

    def compute_rotary(
        self, latents: Tensor, num_reference_frames: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary tables for latents (B, C, T, h, w), the reference image and the history."""
        frames, rows, columns = self._count_grid(latents)
        grids: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
            (range(frames), range(rows), range(columns)),
            ([_REFERENCE_FRAME], range(rows), range(columns)),
        ]
        if self._inputs.history is not None:
            grids += [
                (positions, spread_positions(rows, factor), spread_positions(columns, factor))
                for positions, factor in zip(_HISTORY_FRAMES, (1, 2, 4), strict=True)
            ]
        tables = [
            compute_rotary_at(grid, self.dims.head_dim, device=latents.device) for grid in grids
        ]
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def count_segment_tokens(
        self, latents: Tensor, num_timesteps: int, num_reference_tokens: int = 0
    ) -> tuple[int, ...]:
        """Return the number of noisy tokens and of the others, whose timestep is 0."""
        _, rows, columns = self._count_grid(latents)
        num_others = rows * columns
        if self._inputs.history is not None:
            num_others += sum(
                len(positions) * (rows // factor) * (columns // factor)
                for positions, factor in zip(_HISTORY_FRAMES, (1, 2, 4), strict=True)
            )
        return prod(self._count_grid(latents)), num_others

    def run_blocks(
        self, streams: list[Tensor], inputs: BlockInputs, latents: Tensor
    ) -> list[Tensor]:
        """See `FusedTransformer.run_blocks`; audio is added to this device's noisy tokens."""
        num_noisy, num_others = self.count_segment_tokens(latents, 1)
        num_frames = self._count_grid(latents)[0]
        frame_segments = self.sequence.split_segments(
            (num_noisy // num_frames,) * num_frames + (num_others,)
        )[:-1]
        for index, block in enumerate(self.layers().values()):
            if isinstance(block, AudioBlock):
                audio = [context.audio[block.injector_index] for context in inputs.contexts]
                streams = block(streams, audio, frame_segments, *inputs.select_block(index))
            else:
                streams = block(streams, *inputs.select_block(index))
        return streams

    def unpatchify_tokens(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, L, patch volume * C) -> (B, C, T, h, w), of the noisy tokens alone."""
        num_noisy = prod(
            length // patch for length, patch in zip(size, self.dims.patch, strict=True)
        )
        return super().unpatchify_tokens(x[:, :num_noisy], size)

    def _count_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Return the tokens of latents (B, C, T, h, w) along time, rows and columns."""
        frames, rows, columns = (
            size // patch for size, patch in zip(latents.shape[2:], self.dims.patch, strict=True)
        )
        return frames, rows, columns


def spread_positions(length: int, factor: int) -> list[int]:
    """Return ``length // factor`` positions from 0 to ``length - 1``, both included, rounded down."""
    num_positions = length // factor
    if num_positions == 1:
        return [0]
    return [index * (length - 1) // (num_positions - 1) for index in range(num_positions)]
