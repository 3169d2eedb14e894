"""Ulysses sequence parallelism: all-to-all between a sequence split and a head split (arXiv:2309.14509).

Before attention, an all-to-all turns the sequence split into a head split; after it, another one turns it
back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.parallel.collectives import all_to_all
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import SplitSequence, pad_end


class UlyssesAttention(InnerAttention):
    """Attention over the tokens of all ranks of an axis, each rank with H / N of the heads.

    A rank then holds all tokens of the axis, so padding is cut off before attention.
    """

    accepts_partial_queries = False

    def __init__(self, inner: InnerAttention, sequence: SplitSequence, axis: Axis) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.inner = inner
        self.sequence = sequence
        self.axis = axis

    @property
    def _num_valid_tokens(self) -> int:
        return self.sequence.count_valid_tokens(
            self.sequence.axis.rank - self.axis.rank, self.axis.size
        )

    def make_send_buffer(self, x: Tensor) -> Tensor:
        """Return a send buffer for x (B, l, H, D) with each rank's heads contiguous: (B, l, N, H / N, D)."""
        batch, num_tokens, num_heads, head_dim = x.shape
        return x.new_empty(
            self.axis.size, num_tokens, batch, num_heads // self.axis.size, head_dim
        ).permute(2, 1, 0, 3, 4)

    def start_exchange(self, x: Tensor) -> Callable[[], Tensor]:
        """Start the all-to-all from sequence to head split: see `InnerAttention.start_exchange`.

        x is (B, l, H, D), or a filled buffer of `make_send_buffer`. The returned function waits and returns
        (B, L, H / N, D) of all tokens, without padding.
        """
        if x.dim() == 4:
            packed = self.make_send_buffer(x)
            copy_vectorized_(packed, x.view(packed.shape))
            x = packed
        wait_for_tokens = all_to_all(x.permute(2, 1, 0, 3, 4), self.axis)  # (N, l, B, h, D)
        return lambda: wait_for_tokens().flatten(0, 1)[: self._num_valid_tokens].transpose(0, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention (B, l, H, D) of this rank's tokens.

        q, k, v (B, L, H / N, D) are of all tokens, from `start_exchange`.
        """
        out = self.inner(q, k, v)
        out = pad_end(out, self.axis.size * self.sequence.tokens_per_rank - out.shape[1], dim=1)
        # (N, l, B, h, D)
        parts = all_to_all(out.transpose(0, 1).unflatten(0, (self.axis.size, -1)), self.axis)()
        out = parts.new_empty([parts.shape[dim] for dim in (2, 1, 0, 3, 4)])
        copy_vectorized_(out, parts.permute(2, 1, 0, 3, 4))
        return out.flatten(2, 3)


def copy_vectorized_(out: Tensor, x: Tensor) -> None:
    """Copy x to ``out``, of the same shape, in words of 16 bytes, which a GPU copies faster.

    On the CPU, or where the last dim is not a multiple of 16 bytes, it is an ordinary copy.
    """
    if x.shape[-1] * x.element_size() % 16 == 0 and x.is_cuda:
        out, x = out.view(torch.complex128), x.view(torch.complex128)
    out.copy_(x)


def apply_ulysses(model: FusedTransformer, sequence: SplitSequence, axis: Axis) -> None:
    """Wrap every block's self-attention in `UlyssesAttention`; on an axis of size 1 nothing changes."""
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = UlyssesAttention(attention.inner_attention, sequence, axis)
