"""Ulysses: around attention, ranks trade their share of the tokens for a share of the heads (arXiv:2309.14509)."""

from collections.abc import Callable

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

    A rank then holds all tokens of the axis, so padding is cut off before attention. Two groups of its heads are attended to in turn: the
    first is on its way back meanwhile.
    """

    takes_some_queries = False

    def __init__(self, inner: InnerAttention, sequence: SplitSequence, axis: Axis) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.inner = inner
        self.sequence = sequence
        self.axis = axis

    @property
    def _num_valid(self) -> int:
        return self.sequence.num_valid(self.sequence.axis.rank - self.axis.rank, self.axis.size)

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to trade tokens for heads: x (B, l, H, D) of this rank's tokens; the call returns (B, L, H / N, D) of all tokens."""
        arriving = all_to_all(x.unflatten(2, (self.axis.size, -1)).permute(2, 1, 0, 3, 4), self.axis)  # (N, l, B, h, D)
        return lambda: arriving().flatten(0, 1)[: self._num_valid].transpose(0, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, L, H / N, D) of all tokens, from `begin` -> (B, l, H, D) of this rank's tokens."""
        num_heads = q.shape[2]
        groups = [slice(0, num_heads // 2), slice(num_heads // 2, num_heads)] if num_heads > 1 else [slice(0, 1)]
        returning = [self._begin_back(self.inner(q[:, :, group], k[:, :, group], v[:, :, group])) for group in groups]
        return torch.cat([wait().permute(2, 1, 0, 3, 4) for wait in returning], dim=3).flatten(2, 3)  # (B, l, N, h, D)

    def _begin_back(self, out: Tensor) -> Callable[[], Tensor]:
        """Begin to trade heads for tokens: out (B, L, h', D) of all tokens; the call returns (N, l, B, h', D) of this rank's."""
        padding = self.axis.size * self.sequence.share - out.shape[1]
        if padding:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        return all_to_all(out.transpose(0, 1).unflatten(0, (self.axis.size, -1)), self.axis)


def apply_ulysses(model: WanTransformer, sequence: SplitSequence, axis: Axis) -> None:
    """Wrap every block's self-attention; on an axis of size 1 nothing changes."""
    if axis.size == 1:
        return
    for attention in model.self_attentions:
        attention.inner_attention = UlyssesAttention(attention.inner_attention, sequence, axis)
