"""Fused Wan transformer: `WanTransformer` computed in place, in slices of tokens and for several contexts.

Shapes: B batch, C channels, T h w latent frames, rows and columns, L tokens, D width, R rows of timestep
modulation (one for each segment of tokens that share a timestep, never one for each token). The residual
stream and the linears are in the run's dtype; norms, modulation, gates, rotary embedding, the timestep
branch and the head are float32. Layer names are those of the published checkpoints, except that q, k and v
are one linear.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from wan_dist.models.attention.driving import DrivingStream
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.control import NO_CONTROL, ControlTokens
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import ContextKV, FusedBlock, FusedSelfAttention
from wan_dist.models.kernels.transformer_ops import (
    Scaling,
    layer_norm,
    split_by_segment,
)
from wan_dist.models.transformer import OutputHead, WanTransformer


@dataclass(frozen=True)
class BlockInputs:
    """What all blocks take beside the residual streams, for this device's tokens."""

    time: Tensor
    """(B, R, 6, D) float32, a row for each segment of tokens."""
    contexts: Sequence[ContextKV]
    rotary: tuple[Tensor, Tensor]
    segments: tuple[int, ...]

    def select_block(
        self, index: int
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], tuple[Tensor, Tensor], tuple[int, ...]]:
        """Return the arguments of a block's forward after the streams, for block ``index`` of all."""
        block_contexts = [context.select_block(index) for context in self.contexts]
        return self.time, block_contexts, self.rotary, self.segments


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

    def split_segments(self, segments: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many tokens of each segment this device has."""
        return segments

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens (B, L, C) from this device's shard of them."""
        return x


class FusedOutputHead(OutputHead):
    """Output head that norms a run of tokens with one timestep at a time."""

    def forward(  # type: ignore[override]  # a row of time is of a whole run of tokens
        self, x: Tensor, time: Tensor, segments: tuple[int, ...]
    ) -> Tensor:
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


def list_time_layers(dims: TransformerDims) -> list[str]:
    """Return the names of the layers that embed timesteps."""
    next_layers = ["time_embedding_r"] if dims.takes_next_timestep else []
    return ["time_embedding", *next_layers, "time_projection"]


class FusedTransformer(WanTransformer):
    """`WanTransformer` as pipelines run it: several contexts at once, in place, split over ranks."""

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention | None = None,
    ) -> None:
        super().__init__(dims, dtype)
        inner_attention = inner_attention or InnerAttention()
        self.blocks = nn.ModuleList(
            FusedBlock(dims, dtype, inner_attention.copy()) for _ in range(dims.num_layers)
        )
        self.head = FusedOutputHead(dims)
        self.sequence = WholeSequence()
        self.driving: DrivingStream | None = None
        """What the attentions to a driving video share, see `apply_driving`; None without one."""
        self.time_embeddings: dict[str, tuple[Tensor, Tensor]] = {}
        """What `embed_timesteps` returns for the timesteps of `precompute_time_embeddings`."""

    def layers(self) -> dict[str, nn.Module]:
        """Return all blocks by name, in the order in which they are called.

        Weight sharding, streaming, quantisation and sequence parallelism go by this alone.
        """
        return {name: self.get_submodule(name) for name in self.dims.block_names}

    def set_slice_tokens(self, max_tokens: int | None) -> None:
        """Limit how many tokens go through the blocks' linears at once; None: all."""
        for block in self.layers().values():
            block.slice_tokens = max_tokens  # type: ignore[assignment]  # no module

    def set_vsa_sparsity(self, sparsity: float) -> None:
        """Set the share of the key tiles that video sparse attention leaves out."""
        for attention in self.self_attentions:
            attention.vsa.sparsity = sparsity

    def set_sla_key_share(self, key_share: float) -> None:
        """Set the share of the key blocks that sparse-linear attention attends to."""
        for attention in self.self_attentions:
            attention.sla.key_share = key_share

    @property
    def self_attentions(self) -> Iterator[FusedSelfAttention]:
        """Every block's self-attention, whose ``inner_attention`` may be wrapped."""
        return (
            block.self_attn for block in self.layers().values() if isinstance(block, FusedBlock)
        )

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `WanTransformer.embed_timesteps`; timesteps are on the CPU."""
        if self.time_embeddings:
            return self.time_embeddings[str(timesteps.tolist())]
        return super().embed_timesteps(timesteps)

    def has_time_embeddings(self, timesteps: Iterable[Tensor]) -> bool:
        """Whether all of these timesteps, as of `embed_timesteps`, can be embedded."""
        return not self.time_embeddings or all(
            str(timestep_rows.tolist()) in self.time_embeddings for timestep_rows in timesteps
        )

    def precompute_time_embeddings(
        self, timesteps: Iterable[Tensor], time_layers: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Embed these timesteps, as of `embed_timesteps`, now, then delete the timestep layers.

        In float32 they are as large as a block. No other timesteps can be embedded after that, unless
        ``time_layers`` brings the layers again, by the names of `list_time_layers`.
        """
        for name, layer in (time_layers or {}).items():
            setattr(self, name, layer)
        self.time_embeddings = {}
        self.time_embeddings = {
            str(timestep_rows.tolist()): self.embed_timesteps(timestep_rows)
            for timestep_rows in timesteps
        }
        for name in list_time_layers(self.dims):
            delattr(self, name)

    def forward(  # type: ignore[override]  # a velocity for each context
        self,
        latents: Tensor,
        timesteps: Tensor,
        contexts: Sequence[ContextKV],
        rotary: tuple[Tensor, Tensor],
        residual_cache: ResidualCache | None = None,
        control: ControlTokens = NO_CONTROL,
    ) -> list[Tensor]:
        """Return for each context the velocity (B, C_out, T, h, w), float32, of latents (B, C_in, T, h, w).

        timesteps (B, 1) on the CPU, or more where parts of the video have timesteps of their own, see
        `count_segment_tokens`; a last dim may be added, see `embed_timesteps`. T, h, w must be multiples of
        the patch. ``contexts`` and ``control`` come from `ContextProjection`, ``rotary`` from
        `compute_rotary`. All contexts go through a block before the next block runs, so that its weights are
        gathered or fetched only once. With a ``residual_cache``, a step may reuse what the blocks added in an
        earlier step.
        """
        time, block_time = self.embed_timesteps(timesteps)
        if self.dims.has_vsa:
            t, h, w = latents.shape[2:]
            patch = self.dims.patch
            for attention in self.self_attentions:
                attention.vsa.grid = (t // patch[0], h // patch[1], w // patch[2])
        all_segments = self.count_segment_tokens(
            latents, timesteps.shape[1], control.num_reference_tokens
        )
        x, own_rotary, segments = self.sequence.split(
            control.add_to(self.embed_latents(latents)), rotary, all_segments
        )
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
            streams = self.run_blocks(
                streams, BlockInputs(block_time, contexts, own_rotary, segments), latents
            )
            if residual_cache is not None and input_tokens is not None:
                residual_cache.residuals = [stream - input_tokens for stream in streams]
                del input_tokens
        return [
            self.unpatchify_tokens(
                self.sequence.gather(self.head(x, time, segments))[
                    :, control.num_reference_tokens :
                ],
                latents.shape[2:],
            )
            for x in streams
        ]

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of latents (B, C_in, T, h, w)."""
        return cast(Tensor, self.patch_embedding(latents))

    def run_blocks(
        self, streams: list[Tensor], inputs: BlockInputs, latents: Tensor
    ) -> list[Tensor]:
        """Return the residual streams (B, L, D) behind the last block, one for each context.

        ``streams`` has the tokens, which all contexts share; ``latents`` is the argument of `forward`.
        """
        for index, block in enumerate(self.layers().values()):
            taken = [
                number
                for number, context in enumerate(inputs.contexts)
                if context.skipped_layer != index
            ]
            if len(taken) == len(inputs.contexts):
                streams = block(streams, *inputs.select_block(index))
            elif taken:
                taken_inputs = replace(
                    inputs, contexts=[inputs.contexts[number] for number in taken]
                )
                block([streams[number] for number in taken], *taken_inputs.select_block(index))
            else:
                # Other ranks call the block too, of which each may hold a shard: the result is dropped.
                block([x.clone() for x in streams], *inputs.select_block(index))
        return streams
