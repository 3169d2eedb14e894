"""Spatially parallel VAE: frames are split by rows or columns, and neighbouring ranks exchange halos.

A residual block takes a halo of two pixels on each side and computes those too, so that there is one
exchange for its two convolutions; only the attention of the middle block needs whole frames. The result
equals that of one rank, however the shards are sized.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wan_dist.models.vae.layers import get_memory_format
from wan_dist.models.vae.model import WanVae
from wan_dist.models.vae.video_state import VideoState
from wan_dist.parallel.collectives import all_gather, exchange_halos
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.sequence import pad_end
from wan_dist.planning.degrees import MIN_STRIP_PIXELS


def choose_split_dim(num_rows: int, num_columns: int) -> int:
    """Return the dim of (B, C, F, H, W) along which to split frames: the larger side, W if they are equal."""
    return 4 if num_columns >= num_rows else 3


def split_length_evenly(length: int, num_parts: int) -> list[int]:
    """Return the sizes of ``num_parts`` shards of ``length`` latent pixels, which differ by at most one."""
    bounds = [length * rank // num_parts for rank in range(num_parts + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)]


class SplitVideoState(VideoState):
    """State of encoding or decoding this rank's shard of a video.

    ``dim`` is the dim that is split, ``shard_lengths`` are the sizes of all ranks' shards in latent pixels.
    """

    has_neighbours = True

    def __init__(self, axis: Axis, dim: int, shard_lengths: list[int]) -> None:
        super().__init__(dim, has_before=axis.rank > 0, has_after=axis.rank < axis.size - 1)
        self.axis = axis
        self.shard_lengths = shard_lengths

    def exchange_halos(
        self, x: Tensor, num_pixels: int
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """See `VideoState.exchange_halos`."""
        if not num_pixels:
            return super().exchange_halos(x, 0)
        layout, start = get_memory_format(x), x.shape[self.dim] - num_pixels
        # channels last, as they are in memory on a GPU
        to_previous, to_next = (
            x.narrow(self.dim, offset, num_pixels).movedim(1, -1) for offset in (0, start)
        )
        wait_for_halos = exchange_halos(to_previous, to_next, self.axis)

        def wait_and_convert() -> tuple[Tensor | None, Tensor | None]:
            from_previous, from_next = (
                None if halo is None else halo.movedim(-1, 1).contiguous(memory_format=layout)
                for halo in wait_for_halos()
            )
            return from_previous, from_next

        return wait_and_convert

    def gather_whole(self, x: Tensor) -> Tensor:
        """See `VideoState.gather_whole`; x is in latent resolution."""
        # equal shapes on all ranks
        padded = pad_end(x, max(self.shard_lengths) - x.shape[self.dim], self.dim)
        parts = all_gather(padded, self.axis).unbind()
        return torch.cat(
            [
                part.narrow(self.dim, 0, length)
                for part, length in zip(parts, self.shard_lengths, strict=True)
            ],
            dim=self.dim,
        )

    def narrow_to_shard(self, x: Tensor, scale: int) -> Tensor:
        """Return this rank's shard of a whole x (B, C, F, H, W), in ``scale`` times the latent resolution."""
        start, length = (
            sum(self.shard_lengths[: self.axis.rank]),
            self.shard_lengths[self.axis.rank],
        )
        return x.narrow(self.dim, start * scale, length * scale)


def make_split_video_state(axis: Axis, num_rows: int, num_columns: int) -> SplitVideoState:
    """Return the state, before the first chunk, of a video with ``num_rows`` x ``num_columns`` latent pixels.

    Raises ValueError if a rank's shard would be smaller than `MIN_STRIP_PIXELS`.
    """
    dim = choose_split_dim(num_rows, num_columns)
    shard_lengths = split_length_evenly((num_rows, num_columns)[dim - 3], axis.size)
    if min(shard_lengths) < MIN_STRIP_PIXELS:
        raise ValueError(
            f"{num_rows} x {num_columns} latent pixels cannot be split over {axis.size} ranks"
        )
    return SplitVideoState(axis, dim, shard_lengths)


def encode_split_video(vae: WanVae, chunks: Iterable[Tensor], axis: Axis) -> Tensor:
    """Return the result of `WanVae.encode` for these chunks of whole frames, on every rank of the axis."""
    scale = vae.dims.spatial_scale
    chunk_iterator = iter(chunks)
    first_chunk = next(chunk_iterator)
    state = make_split_video_state(
        axis, first_chunk.shape[3] // scale, first_chunk.shape[4] // scale
    )
    return state.gather_whole(
        vae.encode(
            (
                state.narrow_to_shard(chunk, scale)
                for chunk in itertools.chain([first_chunk], chunk_iterator)
            ),
            state,
        )
    )


def decode_split_video(
    vae: WanVae, latents: Tensor, axis: Axis
) -> tuple[SplitVideoState, Iterator[Tensor]]:
    """Return the state, and an iterator over this rank's shard of `WanVae.decode` of whole latents."""
    state = make_split_video_state(axis, *latents.shape[3:])
    return state, vae.decode(state.narrow_to_shard(latents, 1), state)
