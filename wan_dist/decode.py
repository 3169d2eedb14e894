"""Latents -> frames, by the first way that fits: shared by the ranks, whole, in tiles, on the CPU."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wan_dist.degrees import MIN_STRIP
from wan_dist.models.vae import VaeDims, WanVae
from wan_dist.models.vae_layers import VideoState, memory_format
from wan_dist.parallel.collectives import all_gather, gather_on_first
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.vae import decode_split, shares, split_dim
from wan_dist.video import to_uint8

Convert = Callable[[Tensor], Tensor]
"""Frames (3, n, H, W) in [-1, 1] -> what leaves the device, (n, H, W, 3)."""


@dataclass(frozen=True)
class Way:
    """How frames are made: parallel, whole, tiled or cpu."""

    name: str
    num_tiles: int = 1
    is_tight: bool = False
    """It takes most of the memory that is free."""

    def __str__(self) -> str:
        return f"in {self.num_tiles} tiles" if self.name == "tiled" else "on the CPU" if self.name == "cpu" else self.name

    def parts(self, num_ranks: int) -> int:
        """Return into how many parts a frame is cut."""
        return num_ranks if self.name == "parallel" else self.num_tiles


def uint8_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) in [-1, 1] as (n, H, W, 3) in 0 ... 255, on the same device."""
    return to_uint8(float32_frames(frames))


def float32_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) as (n, H, W, 3), float32."""
    return frames.float().permute(1, 2, 3, 0).contiguous()


def ways_from(name: str, side: int) -> list[Way]:
    """Return the way called ``name`` and those that need less memory, in order; ``side`` is the larger one of the latents."""
    smaller = [*(Way("tiled", number) for number in (2, 4, 8) if side >= 2 * number), Way("cpu")]
    if name == "cpu":
        return smaller[-1:]
    return smaller if name == "tiled" else [Way(name), *smaller]


def decode_bytes(dims: VaeDims, rows: int, columns: int, itemsize: int) -> int:
    """Return about how much memory decoding takes for latents of these rows and columns, whatever the number of frames.

    What causal layers remember is exact; 30 arrays of a frame at full size and the last stage's width stand for the rest, from
    measured peaks (480p and 720p in float32).
    """
    widths = [dims.decoder_dim * multiplier for multiplier in reversed(dims.multipliers)]
    pixels = rows * columns
    remembered = 2 * pixels * (dims.latent_dim + 4 * widths[0])
    for width in widths:
        remembered += 2 * pixels * width * 2 * (dims.num_blocks + 1)
        full_size = pixels * width
        pixels *= 4
    return (remembered + 30 * full_size) * itemsize


def ways_that_fit(name: str, dims: VaeDims, latents: Tensor, axis: Axis, *, budget_gib: float | None) -> list[Way]:
    """Return the ways from ``name`` on for which there seems to be memory on the device of latents (C, T, h, w); the last always.

    The same on all ranks of the axis: the one with the least memory counts.
    """
    rows, columns = latents.shape[2:]
    ways = ways_from(name, max(rows, columns))
    if not latents.is_cuda:
        return ways
    free = torch.cuda.mem_get_info(latents.device)[0] + torch.cuda.memory_reserved(latents.device)
    if budget_gib is not None:
        free = min(free, int(budget_gib * 2**30))
    free -= torch.cuda.memory_allocated(latents.device)
    free = int(all_gather(torch.tensor([free], device=latents.device), axis).min())

    def needed(way: Way) -> int:
        overlap = {"tiled": 2 * dims.reach, "parallel": 2 * MIN_STRIP}.get(way.name, 0)
        length = min(-(-max(rows, columns) // way.parts(axis.size)) + overlap, max(rows, columns))
        return decode_bytes(dims, min(rows, columns), length, 4)

    return [replace(way, is_tight=needed(way) > free // 2) for way in ways[:-1] if needed(way) < free] + ways[-1:]


def decode(vae: WanVae, latents: Tensor, convert: Convert, way: Way, axis: Axis) -> Iterator[Tensor]:
    """Yield the frames (n, H, W, 3) of latents (C, T, h, w) as they are ready, on the first rank of the axis.

    Raises torch.OutOfMemoryError, on every rank of the axis if they share the work, and before the first frame then.
    """
    if way.name == "parallel":
        if way.is_tight and not all_have_room(vae, latents, axis):
            raise torch.OutOfMemoryError
        return decode_parallel(vae, latents, convert, axis)
    if way.name == "tiled":
        return decode_tiled(vae, latents, convert, way.num_tiles)
    return decode_whole(vae, latents.cpu() if way.name == "cpu" else latents, convert)


def decode_whole(vae: WanVae, latents: Tensor, convert: Convert) -> Iterator[Tensor]:
    """Yield the frames of latents (C, T, h, w) as they are ready, converted."""
    for frames in vae.decode(latents.unsqueeze(0)):
        yield convert(frames[0])


def decode_parallel(vae: WanVae, latents: Tensor, convert: Convert, axis: Axis) -> Iterator[Tensor]:
    """Yield the same on the first rank of the axis, and nothing on the others; each decodes its share."""
    state, chunks = decode_split(vae, latents.unsqueeze(0), axis)
    lengths = [length * vae.dims.scale for length in state.lengths]
    for frames in chunks:
        whole = gather_on_first(convert(frames[0]), lengths, state.dim - 2, axis)
        if whole is not None:
            yield whole


def decode_tiled(vae: WanVae, latents: Tensor, convert: Convert, num_tiles: int) -> Iterator[Tensor]:
    """Yield the same, on the CPU, from tiles along the larger side, one after the other; frames are whole with the last one.

    Tiles overlap by as far as the decoder sees, so this is exact; what looks at whole frames is small and computed for each tile.
    """
    latents = latents.unsqueeze(0)
    dim, reach, scale = split_dim(*latents.shape[3:]), vae.dims.reach, vae.dims.scale
    length = latents.shape[dim]
    ends = list(itertools.accumulate(shares(length, num_tiles), initial=0))
    kept: list[list[Tensor]] = []
    for tile, (start, end) in enumerate(itertools.pairwise(ends)):
        first, last = max(start - reach, 0), min(end + reach, length)
        in_frames, in_tile = VideoState(), VideoState()
        kept.append([])
        for number, latent in enumerate(vae.denormalised(latents)):
            features = vae.decoder.begin(latent, in_frames)
            features = features.narrow(dim, first, last - first).contiguous(memory_format=memory_format(features))
            frames = vae.pixels(vae.decoder.finish(features, in_tile))
            own = frames.narrow(dim, (start - first) * scale, (end - start) * scale)
            kept[tile].append(convert(own[0]).cpu())
            if tile == num_tiles - 1:
                yield torch.cat([pieces[number] for pieces in kept], dim=dim - 2)


def all_have_room(vae: WanVae, latents: Tensor, axis: Axis) -> bool:
    """Whether every rank of the axis can decode its share of latents (C, T, h, w): each tries two chunks of that size alone.

    A rank that ran out of memory in the middle would leave the others waiting for its edges.
    """
    share = list(latents.shape[1:])
    share[split_dim(*latents.shape[2:]) - 2] = max(shares(max(latents.shape[2:]), axis.size)) + 2 * MIN_STRIP
    try:
        state = VideoState()
        for _ in range(2):
            vae.decoder(latents.new_zeros(1, latents.shape[0], 1, *share[1:]).to(vae.dtype), state)
        has_room = True
    except torch.OutOfMemoryError:
        has_room = False
    flags = all_gather(torch.tensor([has_room], dtype=torch.int32, device=latents.device), axis)
    return bool(flags.all())
