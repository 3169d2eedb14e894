"""Ulysses: around attention, ranks trade their share of the tokens for a share of the heads (arXiv:2309.14509)."""

import torch
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

    def __init__(self, inner: InnerAttention, sequence: SplitSequence, axis: Axis) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.inner = inner
        self.sequence = sequence
        self.axis = axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, l, H, D) of this rank's tokens -> (B, l, H, D)."""
        num_valid = self.sequence.num_valid(self.sequence.axis.rank - self.axis.rank, self.axis.size)
        shares = torch.stack([q, k, v]).unflatten(3, (self.axis.size, -1))  # (3, B, l, N, h, D)
        shares = all_to_all(shares.permute(3, 0, 1, 2, 4, 5).contiguous(), self.axis)  # (N, 3, B, l, h, D)
        q, k, v = shares.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, :num_valid]  # each (B, L, h, D)
        out = self.inner(q, k, v)
        out = F.pad(out, (0, 0, 0, 0, 0, self.axis.size * self.sequence.share - num_valid))
        out = out.unflatten(1, (self.axis.size, -1)).transpose(0, 1).contiguous()  # (N, B, l, h, D)
        return all_to_all(out, self.axis).permute(1, 2, 0, 3, 4).flatten(2, 3)


def apply_ulysses(model: WanTransformer, sequence: SplitSequence, axis: Axis) -> None:
    """Wrap every block's self-attention; on an axis of size 1 nothing changes."""
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = UlyssesAttention(attention.inner_attention, sequence, axis)
