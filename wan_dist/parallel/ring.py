"""Ring attention: every rank keeps its queries while keys and values go around (arXiv:2310.01889).

Partial results are merged by their log-sum-exp, which is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.attention import InnerAttention, attend_with_lse
from wan_dist.models.transformer import WanTransformer
from wan_dist.parallel.collectives import pass_on
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import SplitSequence


class RingAttention(InnerAttention):
    """Attention of this rank's queries to the keys of all ranks of an axis.

    Each rank of the axis stands for ``num_inside`` neighbouring shares of the sequence, those that Ulysses has brought together.
    """

    takes_some_queries = False

    def __init__(self, inner: InnerAttention, sequence: SplitSequence, axis: Axis, num_inside: int) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.sequence = sequence
        self.axis = axis
        self.num_inside = num_inside

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, L', H, D) of this rank's tokens, without or with padding -> (B, L', H, D)."""
        length = self.num_inside * self.sequence.share
        padding = length - k.shape[1]
        moving = [F.pad(part, (0, 0, 0, 0, 0, padding)).contiguous() for part in (k, v)]  # equal shapes on all ranks
        out, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        for step in range(self.axis.size):
            source = (self.axis.rank - step) % self.axis.size
            num_valid = self.sequence.num_valid(source * self.num_inside, self.num_inside)
            arriving = pass_on(moving, self.axis) if step < self.axis.size - 1 else None  # while this part is attended to
            if num_valid and q.shape[1]:
                part, part_lse = attend_with_lse(self.name, q, *(tensor[:, :num_valid] for tensor in moving))
                merged = torch.logaddexp(lse, part_lse)  # (B, L', H)
                out = out * (lse - merged).exp().unsqueeze(-1) + part.float() * (part_lse - merged).exp().unsqueeze(-1)
                lse = merged
            if arriving is not None:
                moving = arriving()
        return out.to(q.dtype)


def apply_ring(model: WanTransformer, sequence: SplitSequence, axis: Axis, *, num_inside: int) -> None:
    """Wrap every block's self-attention; before `apply_ulysses`, which goes around it. On an axis of size 1 nothing changes."""
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = RingAttention(attention.inner_attention, sequence, axis, num_inside)
