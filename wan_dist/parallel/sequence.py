"""Where the sequence is split over ranks and gathered again. Padding is known by number and never attended to."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.transformer import WanTransformer, WholeSequence
from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis


def pad_end(x: Tensor, num_zeros: int, dim: int) -> Tensor:
    """Return x with zeros after it in ``dim``; x itself, not a copy, if there are to be none."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, num_zeros)) if num_zeros else x


class SplitSequence(WholeSequence):
    """Each rank of ``axis`` has an equal share of the tokens, in order; the last ones may be padding."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.num_tokens = 0
        """Of the whole sequence, without padding; known after the first split."""

    @property
    def share(self) -> int:
        """Tokens of a rank, padding counted."""
        return -(-self.num_tokens // self.axis.size)

    def num_valid(self, first_rank: int, num_ranks: int) -> int:
        """Return how many tokens of ``num_ranks`` neighbouring ranks' shares are no padding."""
        start = first_rank * self.share
        return min(max(self.num_tokens - start, 0), num_ranks * self.share)

    def split(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[int, ...]]:
        """See `WholeSequence.split`."""
        self.num_tokens = x.shape[1]
        start = self.axis.rank * self.share
        own, padding = slice(start, start + self.share), self.axis.size * self.share - self.num_tokens
        x = x[:, own].clone()  # a view would keep the other ranks' tokens alive
        x = pad_end(x, self.share - x.shape[1], dim=1)
        cos, sin = (pad_end(table[own], self.share - len(table[own]), dim=0) for table in rotary)
        ends = torch.tensor(segments).cumsum(0).tolist()
        ends[-1] += padding  # padding is modulated as the last token's segment is
        inside = [min(max(end - start, 0), self.share) for end in [0, *ends]]
        return x, (cos, sin), tuple(after - before for before, after in itertools.pairwise(inside))

    def gather(self, x: Tensor) -> Tensor:
        """See `WholeSequence.gather`."""
        return all_gather(x, self.axis).transpose(0, 1).flatten(1, 2)[:, : self.num_tokens]


def apply_sequence_split(model: WanTransformer, axis: Axis) -> SplitSequence:
    """Split the sequence over the ranks of an axis; attention must be told (`apply_ulysses`, `apply_ring`)."""
    model.sequence = SplitSequence(axis)
    return model.sequence
