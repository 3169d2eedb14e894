"""Ring attention: queries stay on their rank, keys and values are passed around (arXiv:2310.01889).

Partial results are merged by their log-sum-exp, which is exact.
"""

import torch
from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.log_sum_exp import attend_with_lse
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.kernels.transformer_ops import FLOAT32_CHUNK_TOKENS
from wan_dist.parallel.collectives import send_to_next
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import SplitSequence, pad_end


class RingAttention(InnerAttention):
    """Attention of this rank's queries to the keys of all ranks of an axis.

    Each rank of the axis holds ``ulysses_size`` neighbouring shards of the sequence: the Ulysses all-to-all
    has brought them together.
    """

    accepts_partial_queries = False

    def __init__(
        self, inner: InnerAttention, sequence: SplitSequence, axis: Axis, ulysses_size: int
    ) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.sequence = sequence
        self.axis = axis
        self.ulysses_size = ulysses_size

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention (B, L', H, D) of this rank's q, k, v (B, L', H, D), with or without padding."""
        num_padding = self.ulysses_size * self.sequence.tokens_per_rank - k.shape[1]
        # equal shapes on all ranks
        key_value = [pad_end(part, num_padding, dim=1) for part in (k, v)]
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(self.axis.size):
            source_rank = (self.axis.rank - step) % self.axis.size
            num_valid_tokens = self.sequence.count_valid_tokens(
                source_rank * self.ulysses_size, self.ulysses_size
            )
            # the transfer overlaps with attention to this part
            wait_for_next = (
                send_to_next(key_value, self.axis) if step < self.axis.size - 1 else None
            )
            if num_valid_tokens and q.shape[1]:
                part = attend_with_lse(
                    self.name, q, *(tensor[:, :num_valid_tokens] for tensor in key_value)
                )
                if merged is None:
                    merged = part[0].float(), part[1].contiguous()
                else:
                    merge_attention_(*merged, *part)
                del part  # else it is in memory beside the next one
            if wait_for_next is not None:
                key_value = wait_for_next()
        return q if merged is None else merged[0].to(q.dtype)  # this rank has no tokens


def merge_attention_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge attention to other keys into ``out`` (B, L, H, D) and ``lse`` (B, L, H), in place.

    Both are float32; ``lse`` is the log-sum-exp. The outputs are merged in chunks of tokens, which bounds the
    memory of float32 intermediates.
    """
    for start in range(0, out.shape[1], FLOAT32_CHUNK_TOKENS):
        rows = slice(start, start + FLOAT32_CHUNK_TOKENS)
        other_weight = torch.sigmoid(other_lse[:, rows] - lse[:, rows]).unsqueeze(-1)
        out[:, rows].lerp_(other_out[:, rows].float(), other_weight)
    torch.logaddexp(lse, other_lse, out=lse)


def apply_ring(
    model: FusedTransformer, sequence: SplitSequence, axis: Axis, *, ulysses_size: int
) -> None:
    """Wrap every block's self-attention in `RingAttention`; on an axis of size 1 nothing changes.

    Call it before `apply_ulysses`, which wraps the result.
    """
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = RingAttention(
            attention.inner_attention, sequence, axis, ulysses_size
        )
