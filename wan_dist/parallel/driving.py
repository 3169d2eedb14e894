"""Attention to a driving video where ranks share the sequence: which keys and values each rank keeps."""

from torch import Tensor

from wan_dist.models.attention.driving import DrivenAttention, DrivingStream
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import pad_end


def apply_driving(
    model: FusedTransformer, sp_axis: Axis, ring_axis: Axis, *, ulysses_size: int
) -> None:
    """Wrap every block's self-attention in `DrivenAttention`; what these share is ``model.driving``.

    Call it after `apply_ring` and before `apply_ulysses`. With Ulysses a rank then has the driving tokens of
    its heads. On a ring it keeps those of the frames of its own queries, so that no step exchanges them.
    """
    stream = model.driving = DrivingStream()

    def locate_rows(num_tokens: int) -> tuple[int, int]:
        rows_per_rank = -(-num_tokens // sp_axis.size) * ulysses_size
        start = min(ring_axis.rank * rows_per_rank, num_tokens)
        return start, min(start + rows_per_rank, num_tokens)

    def gather_rows(x: Tensor, num_tokens: int) -> Tensor:
        if ring_axis.size == 1:
            return x
        rows_per_rank = -(-num_tokens // sp_axis.size) * ulysses_size
        padded = pad_end(x, rows_per_rank - x.shape[1], dim=1)
        return all_gather(padded, ring_axis).transpose(0, 1).flatten(1, 2)[:, :num_tokens]

    stream.locate_rows, stream.gather_rows = locate_rows, gather_rows
    for layer, attention in enumerate(model.self_attentions):
        attention.inner_attention = DrivenAttention(attention.inner_attention, stream, layer)
