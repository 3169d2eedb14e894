"""Video -> latents and latents -> frames, in one of the ways: shared by the ranks, whole, in tiles, on the CPU."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.layers import VideoState
from wan_dist.models.vae.model import WanVae
from wan_dist.output.video_file import to_uint8
from wan_dist.parallel.collectives import gather_on_first
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.vae_split import decode_split, encode_split, shares, split_dim
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import free_bytes, make_sure_of_room, ranks_that_can
from wan_dist.pipeline.vae_tiles import decode_tiles, encode_tiles
from wan_dist.planning.degrees import MIN_STRIP
from wan_dist.planning.parameter_bytes import vae_weight_bytes
from wan_dist.planning.plan import Plan
from wan_dist.planning.vae_memory import Way, ways_that_fit
from wan_dist.runtime.log import logger
from wan_dist.weights.checkpoint import Checkpoint

Convert = Callable[[Tensor], Tensor]
"""Frames (3, n, H, W) in [-1, 1] -> what leaves the device, (n, H, W, 3)."""


def uint8_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) in [-1, 1] as (n, H, W, 3) in 0 ... 255, on the same device."""
    return to_uint8(float32_frames(frames))


def float32_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) as (n, H, W, 3), float32."""
    return frames.float().permute(1, 2, 3, 0).contiguous()


def dtype_on(device: torch.device, config: RunConfig) -> torch.dtype:
    """Return what the VAE computes in: bfloat16 on a GPU in a run that is bfloat16 as well, unless the user chose."""
    if config.memory.vae_dtype is not None:
        return getattr(torch, config.memory.vae_dtype)
    is_half = config.dtype == "bfloat16" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_half else torch.float32


def find_ways(config: RunConfig, plan: Plan, dims: VaeDims, device: torch.device, axis: Axis, *, encode: bool = False) -> list[Way]:
    """Return the ways for which there seems to be memory, the same on all ranks of the axis; says so if it is not the planned one."""
    planned = plan.arrangement.image if encode else plan.arrangement.vae
    itemsize = dtype_on(device, config).itemsize
    free = free_bytes(device, axis, budget_gib=config.memory.budget_gib) - vae_weight_bytes(dims, itemsize)
    assert plan.load is not None
    size = plan.load.vae_size(encode=encode)
    ways = ways_that_fit(planned.name, dims, size, axis.size, free=free, itemsize=itemsize, encode=encode)
    if ways[0].name != planned.name and config.memory.vae is not None:
        return [replace(planned, is_tight=True), *ways]  # it was asked for, and what is predicted may be too much
    if ways[0].name != planned.name:
        work = "encode" if encode else "decode"
        logger.warning("no room to %s %s beside what is on the GPU; %s instead, with the same result", work, planned, ways[0])
    return ways


@contextmanager
def kernels_tried(dims: VaeDims, way: Way) -> Iterator[None]:
    """Let cuDNN try a few kernels for each shape of convolution where that pays: it takes memory, and a second.

    Its first choice is a fifth slower where channels are not in multiples of 64 (VAE 2.1), and as fast as any where they are
    (bench/NOTES.md).
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark = dims.decoder_dim % 64 != 0 and not way.is_tight
    torch.backends.cudnn.benchmark_limit = 3
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


def load(checkpoint: Checkpoint, config: RunConfig, way: Way, device: torch.device, shelf: Shelf) -> WanVae:
    """Return the VAE where it works in this way."""
    device = torch.device("cpu") if way.name == "cpu" else device
    dtype = dtype_on(device, config)
    return shelf.take("vae", (device, dtype), lambda: checkpoint.vae.load(device, dtype=dtype).lay_out())


def encode(vae: WanVae, chunks: Callable[[], Iterable[Tensor]], way: Way, axis: Axis) -> Tensor:
    """Return the normalised latents (1, C, T, h, w), float32, of a video in chunks, as `WanVae.encode` takes them.

    ``chunks()`` may be called several times. Raises torch.OutOfMemoryError, on every rank of the axis if they share the work.
    """
    if way.name == "tiled":
        return encode_tiles(vae, chunks, way.num_tiles)
    together = _merged(chunks(), way.at_once)
    if way.name != "parallel":
        return vae.encode(together)
    make_sure_of_room(way.num_bytes, next(vae.parameters()).device, axis)
    if way.is_tight:
        zeros = _zeros(vae, 3, 4 * way.at_once, _share(next(iter(chunks())).shape[3:], axis, vae.dims.scale))
        if not all_have_room(lambda state: vae.encoder(vae.pixels_in(zeros), state), vae, axis):
            raise torch.OutOfMemoryError
    return encode_split(vae, together, axis)


def _merged(chunks: Iterable[Tensor], at_once: int) -> Iterator[Tensor]:
    """Yield the first chunk, then up to ``at_once`` of the others together."""
    iterator = iter(chunks)
    yield next(iterator)
    while some := list(itertools.islice(iterator, at_once)):
        yield torch.cat(some, dim=2) if len(some) > 1 else some[0]


def decode(vae: WanVae, latents: Tensor, convert: Convert, way: Way, axis: Axis) -> Iterator[Tensor]:
    """Yield the frames (n, H, W, 3) of latents (C, T, h, w) as they are ready, on the first rank of the axis.

    Raises torch.OutOfMemoryError, on every rank of the axis if they share the work, and before the first frame then.
    """
    vae.latents_at_once = way.at_once
    latents = latents.unsqueeze(0)
    if way.name == "parallel":
        make_sure_of_room(way.num_bytes, latents.device, axis)
        zeros = _zeros(vae, vae.dims.latent_dim, way.at_once, _share(latents.shape[3:], axis))
        if way.is_tight and not all_have_room(lambda state: vae.decoder(zeros, state), vae, axis):
            raise torch.OutOfMemoryError
        return decode_parallel(vae, latents, convert, axis)
    if way.name == "tiled":
        return decode_tiles(vae, latents, way.num_tiles, convert)
    return (convert(frames[0]) for frames in vae.decode(latents.cpu() if way.name == "cpu" else latents))


def _share(size: Sequence[int], axis: Axis, scale: int = 1) -> list[int]:
    """Return the largest part of rows and columns that a rank works on, its neighbours' pixels with it."""
    share = list(size)
    side = split_dim(*size) - 3
    share[side] = (max(shares(size[side] // scale, axis.size)) + 2 * MIN_STRIP) * scale
    return share


def _zeros(vae: WanVae, channels: int, frames: int, size: Sequence[int]) -> Tensor:
    return next(vae.parameters()).new_zeros(1, channels, frames, *size)


def decode_parallel(vae: WanVae, latents: Tensor, convert: Convert, axis: Axis) -> Iterator[Tensor]:
    """Yield the same for latents (1, C, T, h, w) on the first rank of the axis, and nothing on the others; each decodes its share."""
    state, chunks = decode_split(vae, latents, axis)
    lengths = [length * vae.dims.scale for length in state.lengths]
    for frames in chunks:
        whole = gather_on_first(convert(frames[0]), lengths, state.dim - 2, axis)
        if whole is not None:
            yield whole


def all_have_room(work: Callable[[VideoState], Tensor], vae: WanVae, axis: Axis) -> bool:
    """Whether every rank of the axis can do ``work`` on two chunks of its share."""

    def two_chunks() -> None:
        state = VideoState()
        for _ in range(2):
            work(state)

    return all(ranks_that_can(two_chunks, next(vae.parameters()).device, axis))
