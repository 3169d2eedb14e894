"""Sequence split of a transformer's tokens over ranks, and the all-gather of its output.

Padding is known by its number of tokens and is never attended to.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.fused_transformer import FusedTransformer, WholeSequence
from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis


def pad_end(x: Tensor, num_zeros: int, dim: int) -> Tensor:
    """Return x padded with ``num_zeros`` zeros at the end of ``dim``; x itself, not a copy, if that is 0."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, num_zeros)) if num_zeros else x


class SplitSequence(WholeSequence):
    """A sequence split evenly over the ranks of ``axis``, in order; the last tokens may be padding."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.num_tokens = 0
        """Tokens of the whole sequence, without padding; set by `split`."""

    @property
    def tokens_per_rank(self) -> int:
        """Tokens per rank, including padding."""
        return -(-self.num_tokens // self.axis.size)

    def count_valid_tokens(self, first_rank: int, num_ranks: int) -> int:
        """Return the number of tokens, without padding, of ``num_ranks`` ranks from ``first_rank`` on."""
        start = first_rank * self.tokens_per_rank
        return min(max(self.num_tokens - start, 0), num_ranks * self.tokens_per_rank)

    def split(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[int, ...]]:
        """See `WholeSequence.split`."""
        self.num_tokens = x.shape[1]
        start = self.axis.rank * self.tokens_per_rank
        own_rows = slice(start, start + self.tokens_per_rank)
        x = x[:, own_rows].clone()  # a view would keep the other ranks' tokens alive
        x = pad_end(x, self.tokens_per_rank - x.shape[1], dim=1)
        cos, sin = (
            pad_end(table[own_rows], self.tokens_per_rank - len(table[own_rows]), dim=0)
            for table in rotary
        )
        return x, (cos, sin), self.split_segments(segments)

    def split_segments(self, segments: tuple[int, ...]) -> tuple[int, ...]:
        """See `WholeSequence.split_segments`; padding is of the last segment."""
        start = self.axis.rank * self.tokens_per_rank
        segment_ends = list(itertools.accumulate(segments))
        segment_ends[-1] = self.axis.size * self.tokens_per_rank
        shard_ends = [min(max(end - start, 0), self.tokens_per_rank) for end in [0, *segment_ends]]
        return tuple(
            next_end - previous_end for previous_end, next_end in itertools.pairwise(shard_ends)
        )

    def gather(self, x: Tensor) -> Tensor:
        """See `WholeSequence.gather`."""
        return all_gather(x, self.axis).transpose(0, 1).flatten(1, 2)[:, : self.num_tokens]


def apply_sequence_split(model: FusedTransformer, axis: Axis) -> SplitSequence:
    """Split the sequence over the ranks of an axis, and return the split.

    Attention must be parallelized to match it, see `apply_ulysses`, `apply_ring` and `apply_usp`.
    """
    model.sequence = SplitSequence(axis)
    return model.sequence
