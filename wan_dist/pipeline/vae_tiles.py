"""Tiled VAE encoding and decoding, one tile at a time, so that less of a video is in memory at once.

The result is exact, because tiles overlap enough. A tile is a part of the frames' larger side, through all
of the video. What looks at whole frames, the middle block's attention, is at the latents' size, so small,
and is computed for whole frames.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wan_dist.models.vae.layers import get_memory_format
from wan_dist.models.vae.model import WanVae
from wan_dist.models.vae.video_state import VideoState
from wan_dist.parallel.vae_split import choose_split_dim, split_length_evenly


def decode_tiles(
    vae: WanVae, latents: Tensor, num_tiles: int, convert: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yield what `WanVae.decode` yields for latents (1, C, T, h, w), converted, with the last tile.

    ``convert``: frames (3, n, H, W) in [-1, 1] -> (n, H, W, 3). Earlier tiles' frames wait on the host.
    """
    dim, scale = choose_split_dim(*latents.shape[3:]), vae.dims.spatial_scale
    pieces_by_tile: list[list[Tensor]] = []
    tile_bounds = list(_compute_tile_bounds(latents.shape[dim], num_tiles, vae.dims.tile_overlap))
    for start, end, input_start, input_end in tile_bounds:
        frame_state, tile_state = (
            VideoState(),
            VideoState(dim, has_before=input_start > 0, has_after=input_end < latents.shape[dim]),
        )
        pieces_by_tile.append([])
        for latent_index, latent in enumerate(vae.denormalize_latents(latents)):
            features = vae.decoder.compute_features(latent, frame_state)
            features = features.narrow(dim, input_start, input_end - input_start).contiguous(
                memory_format=get_memory_format(features)
            )
            frames = vae.restore_frames(vae.decoder.compute_frames(features, tile_state))
            # The layers cut it off, half at each end inside the frame.
            num_lost = (input_end - input_start) * scale - frames.shape[dim]
            num_lost_before = (
                num_lost // (tile_state.has_before + tile_state.has_after)
                if tile_state.has_before
                else 0
            )
            tile_frames = convert(
                frames.narrow(
                    dim, (start - input_start) * scale - num_lost_before, (end - start) * scale
                )[0]
            )
            if len(pieces_by_tile) < len(tile_bounds):
                pieces_by_tile[-1].append(_copy_to_host(tile_frames))
            else:
                earlier_pieces = (
                    pieces[latent_index].to(tile_frames.device, non_blocking=True)
                    for pieces in pieces_by_tile[:-1]
                )
                yield torch.cat([*earlier_pieces, tile_frames], dim=dim - 2)


def encode_tiles(
    vae: WanVae, make_chunks: Callable[[], Iterable[Tensor]], num_tiles: int
) -> Tensor:
    """Return what `WanVae.encode` returns for ``make_chunks()``, which is called once for each tile."""
    scale, features_by_tile = vae.dims.spatial_scale, list[list[Tensor]]()
    dim, tile_bounds = 0, list[tuple[int, int, int, int]]()
    for tile_index in range(num_tiles):
        state = VideoState()
        features_by_tile.append([])
        for chunk in make_chunks():
            dim = choose_split_dim(*chunk.shape[3:])
            tile_bounds = tile_bounds or list(
                _compute_tile_bounds(chunk.shape[dim] // scale, num_tiles, vae.dims.tile_overlap)
            )
            start, end, input_start, input_end = tile_bounds[tile_index]
            features = vae.encoder.compute_features(
                vae.prepare_frames(
                    chunk.narrow(dim, input_start * scale, (input_end - input_start) * scale)
                ),
                state,
            )
            features_by_tile[-1].append(
                features.narrow(dim, start - input_start, end - start).cpu()
            )
    device = next(vae.parameters()).device
    memory_layout = get_memory_format(features_by_tile[0][0])
    merged_features = (
        torch.cat(tile_features, dim=dim).to(device).contiguous(memory_format=memory_layout)
        for tile_features in zip(*features_by_tile, strict=True)
    )
    return vae.compute_latents(merged_features, VideoState())


def _copy_to_host(x: Tensor) -> Tensor:
    """Start a copy of x to the host; later work on its device is ordered after it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def _compute_tile_bounds(
    num_pixels: int, num_tiles: int, reach: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (start, end, input_start, input_end) of each tile: its latent pixels, and those it needs."""
    ends = itertools.accumulate(split_length_evenly(num_pixels, num_tiles), initial=0)
    for start, end in itertools.pairwise(ends):
        yield start, end, max(start - reach, 0), min(end + reach, num_pixels)
