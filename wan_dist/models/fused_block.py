"""Transformer block of the Wan diffusion transformer, computed in place and in slices of tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.cross import cross_attend
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.sla import SlaAttention
from wan_dist.models.attention.vsa import VsaAttention
from wan_dist.models.audio_projection import AudioContext
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
)
from wan_dist.models.transformer import CrossAttention, FeedForward, SelfAttention, TransformerBlock

TokenSlice = tuple[slice, tuple[int, ...]]
"""A run of tokens, and how many of them lie in each segment."""
NormedSlice = tuple[slice, tuple[int, ...], Tensor | Fp8Tokens]
"""A `TokenSlice` and its tokens, normed for cross-attention."""


@dataclass(frozen=True)
class ContextKV:
    """What blocks attend to: keys and values of one prompt in all of them, the same in all steps."""

    text: Tensor
    """(blocks, 2, B, n + 1, H, D): of the text's n tokens and of one padding row, since all are the same."""
    image: Tensor | None = None
    """(blocks, 2, B, 257 m, H, D): of m images."""
    face: Tensor | None = None
    """(T, n, D): vectors of the driving face in each latent frame, for Animate's face adapter."""
    skipped_layer: int | None = None
    """Block that is left out for this context, as Animate-2 does for the negative prompt."""
    audio: Sequence[AudioContext] = ()
    """What each injection of audio takes, for a model with audio."""

    def select_block(self, index: int) -> tuple[Tensor, ...]:
        """Return the block's k and v of the text, then those of the images if there are any."""
        text = self.text[index].unbind()
        return text if self.image is None else (*text, *self.image[index].unbind())


class RowSliceLinear(nn.Linear):
    """Linear of which a range of outputs can be computed alone."""

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """x (..., in) -> (..., out), or only the outputs of these rows of the weight."""
        return F.linear(x, self.weight[rows], self.bias[rows])

    def prepare_input(self, x: Tensor | Fp8Tokens) -> Tensor | Fp8Tokens:
        """Return x as `forward` takes it, prepared once for several calls."""
        return x

    accepts_fp8_tokens = False
    """Whether x may be rounded to fp8; see kernels/quantized_linear.py."""


class FusedSelfAttention(SelfAttention):
    """Self-attention whose q, k and v are normed and rotated in place, and may be exchanged between ranks."""

    qkv: RowSliceLinear

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__(dims, dtype)
        self.qkv = RowSliceLinear(dims.dim, 3 * dims.dim, dtype=dtype)
        if dims.has_sla:
            self.proj_l = nn.Linear(dims.head_dim, dims.head_dim, dtype=dtype)
            inner_attention = self.sla = SlaAttention(self.proj_l)
        if dims.has_vsa:
            inner_attention = self.vsa = VsaAttention()
        self.inner_attention = inner_attention

    def project_qkv(
        self, x: Tensor | Fp8Tokens, rotary: tuple[Tensor, Tensor], qkv_indices: Sequence[int]
    ) -> Tensor:
        """Return some of q, k and v (B, L, n, H, D / H) of x (B, L, D), ready for attention.

        ``rotary`` has the tables of the same tokens. ``qkv_indices``: n consecutive ones of 0 for q, 1 for
        k, 2 for v.
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
        """Project x (B, L, D) to q, k and v and start their exchange; return the calls that wait for them.

        The exchange of each overlaps with the computation of the next: v, then k, then q.
        """
        x = self.qkv.prepare_input(x)
        width = self.norm_q.weight.shape[0]
        pending_qkv = []
        for qkv_index, norm in ((2, None), (1, self.norm_k), (0, self.norm_q)):
            projection = self.qkv(x, slice(qkv_index * width, (qkv_index + 1) * width)).unflatten(
                -1, (self.num_heads, -1)
            )
            if norm is not None:
                buffer = self.inner_attention.make_send_buffer(projection)
                norm_and_rotate(projection, norm.weight, self.eps, rotary, buffer)
                projection = buffer
            pending_qkv.append(self.inner_attention.start_exchange(projection))
        return pending_qkv[::-1]

    def attend_exchanged(self, pending_qkv: list[Callable[[], Tensor]]) -> Tensor:
        """Return attention of the exchanged q, k and v, (B, L, D), before the linear ``o``.

        ``pending_qkv`` is the list from `start_qkv_exchange`; it is emptied, so that q, k and v are freed.
        """
        q, k, v = (pending_qkv.pop(0)() for _ in range(3))
        return self.inner_attention(q, k, v).flatten(2)


class FusedCrossAttention(CrossAttention):
    """Cross-attention whose k and v of the text's padding are one row, as `ContextKV` has them."""

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__(dims, dtype)
        self.inner_attention = inner_attention

    def forward(self, x: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """x (B, L, D) -> (B, L, D); kv: see `ContextKV.select_block`."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        norm_and_rotate(q, self.norm_q.weight, self.eps, None, q)
        return self.o(cross_attend(self.inner_attention, q, kv, self.text_len).flatten(2))


class FusedFeedForward(FeedForward):
    """Feed-forward whose GELU is computed in place, or by the linear before or after it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> the same shape."""
        up, _, down = self
        if isinstance(down, nn.Linear):
            return down(apply_linear_gelu(up, x))
        return down(up(x), gelu=True)  # a quantised linear may fuse the GELU with its rounding


class FusedBlock(TransformerBlock):
    """Transformer block whose residual stream is changed in place, in slices of tokens."""

    self_attn: FusedSelfAttention

    def __init__(
        self, dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention
    ) -> None:
        super().__init__(dims, dtype)
        self.self_attn = FusedSelfAttention(dims, dtype, inner_attention)
        # Sequence parallelism wraps self-attention only: every rank holds the whole text.
        self.cross_attn = FusedCrossAttention(dims, dtype, inner_attention.copy())
        self.ffn = FusedFeedForward(dims, dtype)
        if dims.has_vsa:
            self.to_gate_compress = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.slice_tokens: int | None = None
        """How many tokens go through the linears at once; None: all. Fewer need less memory."""

    def forward(  # type: ignore[override]  # several streams, and whole runs of tokens of a timestep
        self,
        streams: list[Tensor],
        time: Tensor,
        contexts: Sequence[tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, ...],
    ) -> list[Tensor]:
        """Return the residual streams x (B, L, D), one for each context.

        ``streams`` has one for each context, or a single one that all contexts share; they are changed in
        place. time (B, R, 6, D) float32: row r modulates the ``segments[r]`` tokens after those of row r - 1.
        contexts: k and v, see `ContextKV.select_block`.
        """
        modulation = (self.modulation + time).unsqueeze(3).unbind(2)  # each (B, R, 1, D)
        # A shared stream is copied after self-attention: streams differ from cross-attention on.
        copies = [torch.empty_like(streams[0]) for _ in range(len(contexts) - len(streams))]
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
                del normed  # else it stays in memory during the next attention
        return [*streams, *copies]

    def _make_norm_buffer(self, x: Tensor) -> Tensor | Fp8Tokens:
        """Return a buffer like x for the normed tokens that the linears take."""
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
    ) -> Iterator[NormedSlice]:
        """Add self-attention to x slice by slice; yield each slice normed for cross-attention."""
        shift, scale, gate = modulation[:3]
        scaling = Scaling(scale, shift)
        token_slices = list(split_by_length(segments, self.slice_tokens))
        if len(token_slices) > 1 and self.self_attn.inner_attention.accepts_partial_queries:
            return self._add_attention_of_query_slices(x, scaling, gate, rotary, token_slices)
        return self._add_attention_of_all_queries(x, scaling, gate, rotary, token_slices)

    def _add_attention_of_query_slices(
        self,
        x: Tensor,
        scaling: Scaling,
        gate: Tensor,
        rotary: tuple[Tensor, Tensor],
        token_slices: Sequence[TokenSlice],
    ) -> Iterator[NormedSlice]:
        """Compute k and v of all tokens, then attend from the queries of one slice at a time."""
        attention = self.self_attn
        project_kv = partial(self._project_slice, x, scaling, rotary, (1, 2))
        project_q = partial(self._project_slice, x, scaling, rotary, (0,))
        k, v = compute_in_slices(token_slices, x, project_kv).unbind(2)
        for token_slice, slice_segments in token_slices:
            # Nested, so that q is freed before the linear.
            attention_output = attention.o(
                attention.inner_attention(
                    project_q(token_slice, slice_segments).squeeze(2), k, v
                ).flatten(2)
            )
            normed = self._add_and_norm(x[:, token_slice], attention_output, gate, slice_segments)
            del attention_output
            yield token_slice, slice_segments, normed
            del normed

    def _add_attention_of_all_queries(
        self,
        x: Tensor,
        scaling: Scaling,
        gate: Tensor,
        rotary: tuple[Tensor, Tensor],
        token_slices: Sequence[TokenSlice],
    ) -> Iterator[NormedSlice]:
        """Attend from all tokens at once; only the linears and norms run slice by slice."""
        attention, has_gate = self.self_attn, hasattr(self, "to_gate_compress")
        pending_qkv = self._start_qkv_exchange(x, scaling, rotary, token_slices)
        out = attention.attend_exchanged(pending_qkv)
        for token_slice, slice_segments in token_slices:
            attended = out[:, token_slice]
            if has_gate:
                attended = self._apply_gate(x[:, token_slice], scaling, slice_segments, attended)
            attention_output = attention.o(attended)
            del attended
            if (token_slice, slice_segments) == token_slices[-1]:
                del out  # else it stays in memory during the feed-forward
            normed = self._add_and_norm(x[:, token_slice], attention_output, gate, slice_segments)
            del attention_output
            yield token_slice, slice_segments, normed

    def _apply_gate(
        self, x: Tensor, scaling: Scaling, segments: tuple[int, ...], attended: Tensor
    ) -> Tensor:
        """Return sparse attention plus gated coarse attention (B, l, D) of `attend_in_tiles` (B, l, 2 D).

        The gate is a linear of x (B, l, D), normed as for q.
        """
        normed = layer_norm(x, scaling, segments, self.eps, self._make_norm_buffer(x))
        num_heads = self.self_attn.num_heads
        sparse, coarse = attended.unflatten(-1, (num_heads, 2, -1)).unbind(-2)
        gate = self.to_gate_compress(normed).unflatten(-1, (num_heads, -1))
        return torch.addcmul(sparse, gate, coarse).flatten(2)

    def _start_qkv_exchange(
        self,
        x: Tensor,
        scaling: Scaling,
        rotary: tuple[Tensor, Tensor],
        token_slices: Sequence[TokenSlice],
    ) -> list[Callable[[], Tensor]]:
        """Norm x, project it to q, k and v and start their exchange.

        Of a single slice, the exchange of each overlaps with the projection of the next; of several, q, k
        and v are complete only with the last slice.
        """
        attention = self.self_attn
        if len(token_slices) == 1:
            [(_, segments)] = token_slices
            return attention.start_qkv_exchange(
                layer_norm(x, scaling, segments, self.eps, self._make_norm_buffer(x)), rotary
            )
        project_qkv = partial(self._project_slice, x, scaling, rotary, (0, 1, 2))
        qkv = compute_in_slices(token_slices, x, project_qkv)
        return [
            attention.inner_attention.start_exchange(projection) for projection in qkv.unbind(2)
        ]

    def _project_slice(
        self,
        x: Tensor,
        scaling: Scaling,
        rotary: tuple[Tensor, Tensor],
        qkv_indices: Sequence[int],
        token_slice: slice,
        slice_segments: tuple[int, ...],
    ) -> Tensor:
        """Return q, k or v of a slice of x (see `SelfAttention.project_qkv`), which is normed first."""
        cos, sin = rotary
        x = x[:, token_slice]
        normed = layer_norm(x, scaling, slice_segments, self.eps, self._make_norm_buffer(x))
        return self.self_attn.project_qkv(normed, (cos[token_slice], sin[token_slice]), qkv_indices)

    def _add_and_norm(
        self, x: Tensor, attention_output: Tensor, gate: Tensor, segments: tuple[int, ...]
    ) -> Tensor | Fp8Tokens:
        """Add the gated output of self-attention to x; return x normed for cross-attention."""
        return add_gated_layer_norm_(
            x,
            attention_output,
            gate,
            self._norm3_scaling,
            segments,
            self.eps,
            self._make_norm_buffer(x),
        )

    def _add_cross_attention_and_ffn(
        self,
        x: Tensor,
        normed: Tensor | Fp8Tokens,
        modulation: tuple[Tensor, ...],
        context: tuple[Tensor, ...],
        segments: tuple[int, ...],
    ) -> None:
        """Add to x cross-attention of ``normed``, which is overwritten, then the feed-forward."""
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
