"""A block of the Wan diffusion transformer, computed in place and in slices of tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.cross import cross_attend
from wan_dist.models.attention.inner import InnerAttention
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
