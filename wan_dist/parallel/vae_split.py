"""A video split over ranks by rows or columns while it is encoded or decoded: neighbours trade the pixels at their edges.

A residual block asks for two pixels on each side and computes them too, so that there is one exchange for its two convolutions; only
the attention of the middle block looks at whole frames. Equal to one rank's result, whatever the shares.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wan_dist.models.vae.layers import VideoState, memory_format
from wan_dist.models.vae.model import WanVae
from wan_dist.parallel.collectives import all_gather, trade_edges
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import pad_end
from wan_dist.planning.degrees import MIN_STRIP


def split_dim(rows: int, columns: int) -> int:
    """Return the dim of (B, C, F, H, W) along which frames are split: the larger side, the columns if they are equal."""
    return 4 if columns >= rows else 3


def shares(length: int, num_ranks: int) -> list[int]:
    """Return how many of ``length`` latent pixels each rank has, which differ by one at most."""
    bounds = [length * rank // num_ranks for rank in range(num_ranks + 1)]
    return [after - before for before, after in itertools.pairwise(bounds)]


class SplitState(VideoState):
    """A pass of this rank's share of a video; ``dim`` is the one that is split, ``lengths`` the ranks' shares of the latents."""

    has_neighbours = True

    def __init__(self, axis: Axis, dim: int, lengths: list[int]) -> None:
        super().__init__(dim, has_before=axis.rank > 0, has_after=axis.rank < axis.size - 1)
        self.axis = axis
        self.lengths = lengths

    def trade(self, x: Tensor, num_pixels: int) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """See `VideoState.trade`."""
        if not num_pixels:
            return super().trade(x, 0)
        form, start = memory_format(x), x.shape[self.dim] - num_pixels
        first, last = (x.narrow(self.dim, place, num_pixels).movedim(1, -1) for place in (0, start))  # as they are on a GPU
        arriving = trade_edges(first, last, self.axis)

        def arrived() -> tuple[Tensor | None, Tensor | None]:
            before, after = (None if edge is None else edge.movedim(-1, 1).contiguous(memory_format=form) for edge in arriving())
            return before, after

        return arrived

    def whole(self, x: Tensor) -> Tensor:
        """See `VideoState.whole`; x is of the latents' size."""
        padded = pad_end(x, max(self.lengths) - x.shape[self.dim], self.dim)  # equal shapes on all ranks
        parts = all_gather(padded, self.axis).unbind()
        return torch.cat([part.narrow(self.dim, 0, length) for part, length in zip(parts, self.lengths, strict=True)], dim=self.dim)

    def own(self, x: Tensor, scale: int) -> Tensor:
        """Return this rank's share of a whole x (B, C, F, H, W), which is ``scale`` times the latents' size."""
        start, length = sum(self.lengths[: self.axis.rank]), self.lengths[self.axis.rank]
        return x.narrow(self.dim, start * scale, length * scale)


def split_state(axis: Axis, rows: int, columns: int) -> SplitState:
    """Return the state of a video whose latents have ``rows`` and ``columns``, before its first chunk.

    Raises ValueError if a rank's share would be smaller than `MIN_STRIP`.
    """
    dim = split_dim(rows, columns)
    lengths = shares((rows, columns)[dim - 3], axis.size)
    if min(lengths) < MIN_STRIP:
        raise ValueError(f"{rows} x {columns} latent pixels cannot be split over {axis.size} ranks")
    return SplitState(axis, dim, lengths)


def encode_split(vae: WanVae, chunks: Iterable[Tensor], axis: Axis) -> Tensor:
    """Return what `WanVae.encode` returns for these chunks of whole frames, on every rank of the axis."""
    scale = vae.dims.scale
    iterator = iter(chunks)
    first = next(iterator)
    state = split_state(axis, first.shape[3] // scale, first.shape[4] // scale)
    return state.whole(vae.encode((state.own(chunk, scale) for chunk in itertools.chain([first], iterator)), state))


def decode_split(vae: WanVae, latents: Tensor, axis: Axis) -> tuple[SplitState, Iterator[Tensor]]:
    """Return the state and this rank's share of what `WanVae.decode` yields for whole latents."""
    state = split_state(axis, *latents.shape[3:])
    return state, vae.decode(state.own(latents, 1), state)
