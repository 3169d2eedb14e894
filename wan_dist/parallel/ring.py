"""Ring attention: queries stay on their rank, keys and values are passed around (arXiv:2310.01889).

Partial results are merged by their log-sum-exp, which is exact.
"""

from collections.abc import Iterator

from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.log_sum_exp import (
    KeyBias,
    attend_with_lse,
    merge_parts,
    split_keys,
)
from wan_dist.models.fused_transformer import FusedTransformer
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
        merged = self.attend_with_lse(q, k, v)
        return q if merged is None else merged[0].to(q.dtype)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, bias: KeyBias | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """See `InnerAttention.attend_with_lse`; None where this rank has no tokens."""
        return merge_parts(self._attend_to_parts(q, k, v, bias))

    def _attend_to_parts(
        self, q: Tensor, k: Tensor, v: Tensor, bias: KeyBias | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield attention, with its log-sum-exp, to the keys of one rank after the other."""
        rows_per_rank = self.ulysses_size * self.sequence.tokens_per_rank
        # equal shapes on all ranks
        key_value = [pad_end(part, rows_per_rank - k.shape[1], dim=1) for part in (k, v)]
        for step in range(self.axis.size):
            source_rank = (self.axis.rank - step) % self.axis.size
            num_valid_tokens = self.sequence.count_valid_tokens(
                source_rank * self.ulysses_size, self.ulysses_size
            )
            # the transfer overlaps with attention to this part
            wait_for_next = (
                send_to_next(key_value, self.axis) if step < self.axis.size - 1 else None
            )
            if q.shape[1]:
                for keys, value in split_keys(num_valid_tokens, bias, source_rank * rows_per_rank):
                    part = attend_with_lse(self.name, q, *(tensor[:, keys] for tensor in key_value))
                    yield part[0], part[1] + value if value else part[1]
                    del part  # else it is in memory beside the next one
            if wait_for_next is not None:
                key_value = wait_for_next()


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
