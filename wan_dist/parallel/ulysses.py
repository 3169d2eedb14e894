"""Ulysses: around attention, ranks trade their share of the tokens for a share of the heads (arXiv:2309.14509)."""

import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.attention import InnerAttention
from wan_dist.models.transformer import WanTransformer
from wan_dist.parallel.collectives import all_to_all
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import SplitSequence


class UlyssesAttention(InnerAttention):
    """Attention over the tokens of all ranks of an axis, each rank with H / N of the heads.

    q, k and v go in one packed exchange. A rank then holds all tokens of the axis, so padding is cut off before attention.
    """

    takes_some_queries = False

    def __init__(self, inner: InnerAttention, sequence: SplitSequence, axis: Axis) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.inner = inner
        self.sequence = sequence
        self.axis = axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, l, H, D) of this rank's tokens -> (B, l, H, D)."""
        num_valid = self.sequence.num_valid(self.sequence.axis.rank - self.axis.rank, self.axis.size)
        batch, num_tokens, num_heads, width = q.shape
        packed = q.new_empty(self.axis.size, num_tokens, batch, 3, num_heads // self.axis.size, width)
        for place, part in enumerate((q, k, v)):
            packed[:, :, :, place] = part.unflatten(2, (self.axis.size, -1)).permute(2, 1, 0, 3, 4)
        packed = all_to_all(packed, self.axis).flatten(0, 1)[:num_valid]  # (L, B, 3, h, D)
        out = self.inner(*packed.transpose(0, 1).unbind(2))
        del packed
        out = F.pad(out, (0, 0, 0, 0, 0, self.axis.size * self.sequence.share - num_valid))
        out = out.transpose(0, 1).unflatten(0, (self.axis.size, -1))  # (N, l, B, h, D)
        return all_to_all(out, self.axis).permute(2, 1, 0, 3, 4).flatten(2, 3)


def apply_ulysses(model: WanTransformer, sequence: SplitSequence, axis: Axis) -> None:
    """Wrap every block's self-attention; on an axis of size 1 nothing changes."""
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = UlyssesAttention(attention.inner_attention, sequence, axis)
