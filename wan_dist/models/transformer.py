"""The Wan diffusion transformer, for one device. What it looks at, the prompt and images, is prepared in context.py.

Shapes: B batch, C channels, T h w latent frames, rows and columns, L tokens, D width, R rows of timestep modulation (one for each
run of tokens that share a timestep, never one for each token). The residual stream and the linears are in the run's dtype; norms,
modulation, gates, rotary, the timestep branch and the head are float32.
Layer names are those of the published checkpoints, except that q, k, v are one linear.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.cross import cross_attend
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.rotary import compute_rotary_tables
from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels.transformer_ops import (
    Fp8Tokens,
    Scaling,
    add_gated_,
    add_gated_layer_norm_,
    apply_linear_gelu,
    compute_in_slices,
    layer_norm,
    make_output_buffer,
    norm_and_rotate,
    split_by_length,
    split_by_segment,
)


@dataclass(frozen=True)
class ContextKV:
    """Cross-attention's k and v of one prompt in all blocks, which stay the same for all steps."""

    text: Tensor
    """(blocks, 2, B, n + 1, H, D): of the text's n tokens and of the padding, whose rows are all the same."""
    image: Tensor | None = None
    """(blocks, 2, B, 257 m, H, D): of m images."""

    def select_block(self, index: int) -> tuple[Tensor, ...]:
        """Return the block's k and v of the text, then those of the images if there are any."""
        text = self.text[index].unbind()
        return text if self.image is None else (*text, *self.image[index].unbind())


@dataclass
class ResidualCache:
    """What all blocks together add to the tokens, for each context."""

    can_reuse: Callable[[Tensor], bool]
    """Whether a step, by its timestep's embedding (B, R, 6, D), takes what is kept."""
    residuals: list[Tensor] = field(default_factory=list)


class NormParameters(nn.Module):
    """The weight (and bias) of a norm, kept in float32."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None


class RowSliceLinear(nn.Linear):
    """A linear of which some outputs can be computed alone."""

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """x (..., in) -> (..., out), or those outputs whose rows of the weight these are."""
        return F.linear(x, self.weight[rows], self.bias[rows])

    def prepare_input(self, x: Tensor | Fp8Tokens) -> Tensor | Fp8Tokens:
        """Return x as `forward` takes it; once for several calls."""
        return x

    accepts_fp8_tokens = False
    """Whether x may be rounded to fp8; see models/quantized.py."""


class SelfAttention(nn.Module):
    """Self-attention over all tokens, with RMSNorm over the whole width on q and k, and rotary embedding."""

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.eps = dims.eps
        self.qkv = RowSliceLinear(dims.dim, 3 * dims.dim, dtype=dtype)
        self.o = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_q = NormParameters(dims.dim, bias=False)
        self.norm_k = NormParameters(dims.dim, bias=False)
        self.inner_attention = inner_attention

    def project_qkv(
        self, x: Tensor | Fp8Tokens, rotary: tuple[Tensor, Tensor], qkv_indices: Sequence[int]
    ) -> Tensor:
        """Return some of q, k and v (B, L, n, H, D / H) of x (B, L, D), ready for attention; rotary tables of the same tokens.

        ``which``: n neighbours of 0 for q, 1 for k, 2 for v.
        """
        width = self.norm_q.weight.shape[0]
        projected: Tensor = self.qkv(
            x, slice(qkv_indices[0] * width, (qkv_indices[-1] + 1) * width)
        ).unflatten(-1, (len(qkv_indices), self.num_heads, -1))
        for qkv_index, norm in enumerate((self.norm_q, self.norm_k)):
            if qkv_index in qkv_indices:
                projection = projected[:, :, qkv_index - qkv_indices[0]]
                norm_and_rotate(projection, norm.weight, self.eps, rotary, projection)
        return projected

    def start_qkv_exchange(
        self, x: Tensor | Fp8Tokens, rotary: tuple[Tensor, Tensor]
    ) -> list[Callable[[], Tensor]]:
        """Begin to bring q, k and v of x (B, L, D) to where they are attended to: each is on its way while the next one is computed."""
        x, inner_attention, width, pending_qkv = (
            self.qkv.prepare_input(x),
            self.inner_attention,
            self.norm_q.weight.shape[0],
            [],
        )
        for qkv_index, norm in ((2, None), (1, self.norm_k), (0, self.norm_q)):
            projection = self.qkv(x, slice(qkv_index * width, (qkv_index + 1) * width)).unflatten(
                -1, (self.num_heads, -1)
            )
            if norm is not None:
                norm_and_rotate(
                    projection,
                    norm.weight,
                    self.eps,
                    rotary,
                    buffer := inner_attention.make_send_buffer(projection),
                )
                projection = buffer
            pending_qkv.append(inner_attention.start_exchange(projection))
        return pending_qkv[::-1]

    def attend_exchanged(self, pending_qkv: list[Callable[[], Tensor]]) -> Tensor:
        """Attention of q, k and v of all tokens, from `begin`, which are let go: (B, L, D), before the linear ``o``."""
        q, k, v = (pending_qkv.pop(0)() for _ in range(3))
        return self.inner_attention(q, k, v).flatten(2)


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the text's and the image's, whose k and v come from `ContextProjection`."""

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.text_len = dims.text_len
        self.eps = dims.eps
        self.q = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.o = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_q = NormParameters(dims.dim, bias=False)
        self.inner_attention = inner_attention

    def forward(self, x: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """x (B, L, D) -> (B, L, D); kv: see `ContextKV.of_block`."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        norm_and_rotate(q, self.norm_q.weight, self.eps, None, q)
        return self.o(cross_attend(self.inner_attention, q, kv, self.text_len).flatten(2))


class FeedForward(nn.Sequential):
    """Two linears with a GELU between them."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        up, down = (
            nn.Linear(*widths, dtype=dtype)
            for widths in ((dims.dim, dims.ffn_dim), (dims.ffn_dim, dims.dim))
        )
        super().__init__(up, nn.Identity(), down)  # the checkpoints count the GELU

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> the same shape."""
        up, _, down = self
        return (
            down(apply_linear_gelu(up, x))
            if isinstance(down, nn.Linear)
            else down(up(x), gelu=True)
        )  # what is quantised may do it itself


class TransformerBlock(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__()
        self.eps = dims.eps
        self.self_attn = SelfAttention(dims, dtype, inner_attention)
        # Sequence-parallel attention wraps the self-attention's seam only: every rank holds the whole text.
        self.cross_attn = CrossAttention(
            dims, dtype, InnerAttention(inner_attention.kernel, inner_attention.name)
        )
        self.norm3 = NormParameters(dims.dim, bias=True)
        self.ffn = FeedForward(dims, dtype)
        self.modulation = nn.Parameter(torch.zeros(1, 6, dims.dim))
        self.slice_tokens: int | None = None
        """How many tokens go through the linears at once; None: all. Fewer take less memory."""

    def forward(
        self,
        streams: list[Tensor],
        time: Tensor,
        contexts: Sequence[tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, ...],
    ) -> list[Tensor]:
        """Return the residual streams x (B, L, D), one for each context, from as many, changed in place, or from one that all share.

        time (B, R, 6, D) float32: row r modulates the ``segments[r]`` tokens after those of row r - 1. contexts: k and v, see
        `ContextKV.of_block`.
        """
        modulation = (self.modulation + time).unsqueeze(3).unbind(2)  # each (B, R, 1, D)
        copies = [
            torch.empty_like(streams[0]) for _ in range(len(contexts) - len(streams))
        ]  # streams differ from cross-attention on
        for stream_index, x in enumerate(streams):
            for token_slice, slice_segments, normed in self._add_self_attention(
                x, modulation, rotary, segments
            ):
                for copy in copies:
                    copy[:, token_slice] = x[:, token_slice]
                self._add_cross_attention_and_ffn(
                    x[:, token_slice], normed, modulation, contexts[stream_index], slice_segments
                )
                for copy, context in zip(copies, contexts[1:], strict=False):
                    layer_norm(
                        copy[:, token_slice], self._norm3_scaling, slice_segments, self.eps, normed
                    )
                    self._add_cross_attention_and_ffn(
                        copy[:, token_slice], normed, modulation, context, slice_segments
                    )
                del normed  # it would be there during the next attention
        return [*streams, *copies]

    def _make_norm_buffer(self, x: Tensor) -> Tensor | Fp8Tokens:
        """Return room for what the linears take in x's place."""
        return make_output_buffer(x, as_fp8=self.self_attn.qkv.accepts_fp8_tokens)

    @property
    def _norm3_scaling(self) -> Scaling:
        weight, bias = (
            parameter.view(1, 1, 1, -1)
            for parameter in (self.norm3.weight, cast(Tensor, self.norm3.bias))
        )
        return Scaling(weight, bias, plus_one=False)

    def _add_self_attention(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, ...],
    ) -> Iterator[tuple[slice, tuple[int, ...], Tensor | Fp8Tokens]]:
        """Add self-attention to x part by part; yields each part, its segments, and its tokens normed for cross-attention."""
        shift, scale, gate = modulation[:3]
        token_slices = list(split_by_length(segments, self.slice_tokens))
        attention, scaling = self.self_attn, Scaling(scale, shift)

        def project(part: slice, inside: tuple[int, ...], qkv_indices: Sequence[int]) -> Tensor:
            normed = layer_norm(
                x[:, part], scaling, inside, self.eps, self._make_norm_buffer(x[:, part])
            )
            return attention.project_qkv(normed, (rotary[0][part], rotary[1][part]), qkv_indices)

        if len(token_slices) > 1 and attention.inner_attention.accepts_partial_queries:
            k, v = compute_in_slices(
                token_slices, x, lambda part, inside: project(part, inside, (1, 2))
            ).unbind(2)
            for part, inside in token_slices:
                out = attention.o(
                    attention.inner_attention(project(part, inside, (0,)).squeeze(2), k, v).flatten(
                        2
                    )
                )
                normed = add_gated_layer_norm_(
                    x[:, part],
                    out,
                    gate,
                    self._norm3_scaling,
                    inside,
                    self.eps,
                    self._make_norm_buffer(x[:, part]),
                )
                del out
                yield part, inside, normed
                del normed
            return
        if len(token_slices) == 1:
            pending_qkv = attention.start_qkv_exchange(
                layer_norm(x, scaling, segments, self.eps, self._make_norm_buffer(x)), rotary
            )
        else:
            qkv = compute_in_slices(
                token_slices, x, lambda part, inside: project(part, inside, (0, 1, 2))
            )
            pending_qkv = [
                attention.inner_attention.start_exchange(projection) for projection in qkv.unbind(2)
            ]
            del qkv
        out = attention.attend_exchanged(pending_qkv)
        for part, inside in token_slices:
            attention_output = attention.o(out[:, part])
            if (part, inside) == token_slices[-1]:
                del out  # it would be there during the feed-forward, as what is added
            normed = add_gated_layer_norm_(
                x[:, part],
                attention_output,
                gate,
                self._norm3_scaling,
                inside,
                self.eps,
                self._make_norm_buffer(x[:, part]),
            )
            del attention_output
            yield part, inside, normed

    def _add_cross_attention_and_ffn(
        self,
        x: Tensor,
        normed: Tensor | Fp8Tokens,
        modulation: tuple[Tensor, ...],
        context: tuple[Tensor, ...],
        segments: tuple[int, ...],
    ) -> None:
        """Add cross-attention of what was normed for it, which is lost, then the feed-forward, to x."""
        shift, scale, gate = modulation[3:]
        add_gated_layer_norm_(
            x,
            self.cross_attn(normed, context),
            None,
            Scaling(scale, shift),
            segments,
            self.eps,
            normed,
        )
        add_gated_(x, self.ffn(normed), gate, segments)


class WholeSequence(nn.Module):
    """The sequence on one device: nothing to split. The seam that sequence parallelism replaces."""

    def split(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[int, ...]]:
        """Return this device's share of the tokens x (B, L, D), of their rotary tables (L, 1, D / 2) and of the segments."""
        return x, rotary, segments

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens (B, L, C) of this device's share."""
        return x


class PatchEmbedding(nn.Module):
    """Latents to tokens: a convolution whose stride is its kernel, computed as one matrix product."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch = dims.patch
        self.weight = nn.Parameter(torch.zeros(dims.dim, dims.in_dim, *dims.patch, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dims.dim, dtype=dtype))

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, T, h, w) -> tokens (B, L, D)."""
        for dim, size in zip((2, 4, 6), self.patch, strict=True):
            latents = latents.unflatten(dim, (-1, size))
        patches = (
            latents.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        )  # (B, L, C * patch volume)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class OutputHead(nn.Module):
    """The last norm and linear, in float32: its rounding would land in the latents as it is."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__()
        self.eps = dims.eps
        self.head = nn.Linear(dims.dim, math.prod(dims.patch) * dims.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dims.dim))

    def forward(self, x: Tensor, time: Tensor, segments: tuple[int, ...]) -> Tensor:
        """x (B, L, D); time (B, R, D) float32, a row for each segment of tokens -> (B, L, patch volume * C) float32."""
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
    """Predicts the velocity of noisy video latents for a prompt and images (Wan technical report, arXiv:2503.20314)."""

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
        """What `embed_time` returns for the timesteps of `keep_times`."""

    def set_slice_tokens(self, max_tokens: int | None) -> None:
        """Let at most so many tokens through the blocks' linears at once; None: all."""
        for block in self.blocks:
            cast(TransformerBlock, block).slice_tokens = max_tokens

    @property
    def self_attentions(self) -> Iterator[SelfAttention]:
        """Every block's self-attention, whose ``inner_attention`` may be wrapped."""
        return (cast(TransformerBlock, block).self_attn for block in self.blocks)

    def compute_rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary tables for latents of this shape, to be kept for all steps; latents (B, C, T, h, w)."""
        t, h, w = (
            size // patch for size, patch in zip(latents.shape[2:], self.dims.patch, strict=True)
        )
        return compute_rotary_tables((t, h, w), self.dims.head_dim, device=latents.device)

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, R, D) for the head and (B, R, 6, D) for the blocks, float32, of timesteps (B, R) in [0, 1000], on the CPU."""
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
        """Embed these timesteps (B, R) now, and let go of the layers that do it: in float32 they are a block's size. No others then."""
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

        timesteps (B, 1) on the CPU, or (B, 2) where the first latent frame has a timestep of its own, the first of the two. T, h, w must be
        multiples of the patch. ``contexts`` come from `ContextProjection`, ``rotary`` from `rotary`. All contexts go through a block
        before the next one's turn, so that weights which are gathered or fetched for it are so once. ``added`` lets a step take
        what the blocks added in an earlier one.
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
        x = x.unflatten(1, token_grid).unflatten(
            -1, (*self.dims.patch, -1)
        )  # (B, t, y, x, pt, py, px, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, *size)
