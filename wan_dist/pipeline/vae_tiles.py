"""A video through the VAE in tiles, one after the other, so that less of it is in memory: exact, because tiles overlap enough.

A tile is a part of the frames' larger side, through all of the video. What looks at whole frames is small and done for whole frames.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wan_dist.models.vae.layers import VideoState, memory_format
from wan_dist.models.vae.model import WanVae
from wan_dist.parallel.vae_split import shares, split_dim


def decode_tiles(vae: WanVae, latents: Tensor, num_tiles: int, convert: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Yield what `WanVae.decode` yields for latents (1, C, T, h, w), converted; frames are whole with the last tile.

    ``convert``: frames (3, n, H, W) in [-1, 1] -> (n, H, W, 3).
    """
    dim, scale = split_dim(*latents.shape[3:]), vae.dims.scale
    kept: list[list[Tensor]] = []
    tiles = list(_tiles(latents.shape[dim], num_tiles, vae.dims.reach))
    for start, end, first, last in tiles:
        in_frames, in_tile = VideoState(), VideoState(dim, has_before=first > 0, has_after=last < latents.shape[dim])
        kept.append([])
        for number, latent in enumerate(vae.denormalised(latents)):
            features = vae.decoder.begin(latent, in_frames)
            features = features.narrow(dim, first, last - first).contiguous(memory_format=memory_format(features))
            frames = vae.pixels(vae.decoder.finish(features, in_tile))
            lost = (last - first) * scale - frames.shape[dim]  # the layers cut it off, half at each end inside the frame
            before = lost // (in_tile.has_before + in_tile.has_after) if in_tile.has_before else 0
            own = convert(frames.narrow(dim, (start - first) * scale - before, (end - start) * scale)[0])
            if len(kept) < len(tiles):
                kept[-1].append(_to_host(own))
            else:
                earlier = (pieces[number].to(own.device, non_blocking=True) for pieces in kept[:-1])
                yield torch.cat([*earlier, own], dim=dim - 2)


def encode_tiles(vae: WanVae, chunks: Callable[[], Iterable[Tensor]], num_tiles: int) -> Tensor:
    """Return what `WanVae.encode` returns for ``chunks()``, which is called for each tile."""
    scale, kept = vae.dims.scale, list[list[Tensor]]()
    dim, whole = 0, list[tuple[int, int, int, int]]()
    for tile in range(num_tiles):
        state = VideoState()
        kept.append([])
        for chunk in chunks():
            dim = split_dim(*chunk.shape[3:])
            whole = whole or list(_tiles(chunk.shape[dim] // scale, num_tiles, vae.dims.reach))
            start, end, first, last = whole[tile]
            features = vae.encoder.begin(vae.pixels_in(chunk.narrow(dim, first * scale, (last - first) * scale)), state)
            kept[-1].append(features.narrow(dim, start - first, end - start).cpu())
    device = next(vae.parameters()).device
    form = memory_format(kept[0][0])
    together = (torch.cat(parts, dim=dim).to(device).contiguous(memory_format=form) for parts in zip(*kept, strict=True))
    return vae.latents_of(together, VideoState())


def _to_host(x: Tensor) -> Tensor:
    """Begin to copy x to the host; whatever its device does later comes after that."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def _tiles(length: int, num_tiles: int, reach: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield for each tile (start, end, first, last): its latent pixels, and those it is made from."""
    ends = itertools.accumulate(shares(length, num_tiles), initial=0)
    for start, end in itertools.pairwise(ends):
        yield start, end, max(start - reach, 0), min(end + reach, length)
