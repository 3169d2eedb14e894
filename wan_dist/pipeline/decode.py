"""VAE encoding and decoding of a video by one strategy: parallel over ranks, whole, tiled or on the CPU."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.model import WanVae
from wan_dist.models.vae.video_state import VideoState
from wan_dist.output.video_file import convert_to_10_bits, convert_to_uint8
from wan_dist.parallel.collectives import gather_on_first_rank
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.vae_split import (
    choose_split_dim,
    decode_split_video,
    encode_split_video,
    split_length_evenly,
)
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import (
    ensure_ranks_can_allocate,
    measure_free_bytes,
    probe_memory_by_rank,
)
from wan_dist.pipeline.vae_tiles import decode_tiles, encode_tiles
from wan_dist.planning.degrees import MIN_STRIP_PIXELS
from wan_dist.planning.parameter_bytes import count_vae_weight_bytes
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.vae_memory import VaeStrategy, find_fitting_strategies
from wan_dist.runtime.log import logger
from wan_dist.weights.checkpoint import Checkpoint

FrameConverter = Callable[[Tensor], Tensor]
"""Converts frames (3, n, H, W) in [-1, 1] to what leaves the device, (n, H, W, 3)."""


def convert_to_uint8_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) in [-1, 1] as (n, H, W, 3) in 0 ... 255, on the same device."""
    return convert_to_uint8(convert_to_float32_frames(frames))


def convert_to_10_bit_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) in [-1, 1] as bytes (n, H, W, 6); see `convert_to_10_bits`."""
    return convert_to_10_bits(convert_to_float32_frames(frames))


def convert_to_float32_frames(frames: Tensor) -> Tensor:
    """Return frames (3, n, H, W) as (n, H, W, 3), float32."""
    return frames.float().permute(1, 2, 3, 0).contiguous()


def choose_vae_dtype(device: torch.device, config: RunConfig) -> torch.dtype:
    """Return the VAE's dtype: bfloat16 on a GPU in a bfloat16 run, else float32, unless it is set."""
    if config.memory.vae_dtype is not None:
        return getattr(torch, config.memory.vae_dtype)
    is_half = (
        config.dtype == "bfloat16"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.bfloat16 if is_half else torch.float32


def find_vae_strategies(
    config: RunConfig,
    plan: RunPlan,
    dims: VaeDims,
    device: torch.device,
    axis: Axis,
    *,
    is_encoding: bool = False,
) -> list[VaeStrategy]:
    """Return the strategies that are predicted to fit into free memory, the same on all ranks of the axis.

    Logs a warning if the first is not the planned one. One that the user requested comes first in any case.
    """
    planned_strategy = plan.arrangement.image if is_encoding else plan.arrangement.vae
    itemsize = choose_vae_dtype(device, config).itemsize
    available_bytes = measure_free_bytes(
        device, axis, budget_gib=config.memory.budget_gib
    ) - count_vae_weight_bytes(dims, itemsize)
    latent_size = plan.workload.get_vae_size(encode=is_encoding)
    strategies = find_fitting_strategies(
        planned_strategy.name,
        dims,
        latent_size,
        axis.size,
        free_bytes=available_bytes,
        itemsize=itemsize,
        encode=is_encoding,
    )
    if strategies[0].name != planned_strategy.name and config.memory.vae is not None:
        # It was requested, and the prediction may be too high.
        return [replace(planned_strategy, is_tight=True), *strategies]
    if strategies[0].name != planned_strategy.name:
        operation = "encode" if is_encoding else "decode"
        logger.warning(
            "not enough free GPU memory to %s %s; using %s, with the same result",
            operation,
            planned_strategy,
            strategies[0],
        )
    return strategies


def choose_vae_strategies(
    config: RunConfig,
    plan: RunPlan,
    dims: VaeDims,
    device: torch.device,
    axis: Axis,
    model_cache: ModelCache,
    *,
    is_encoding: bool = False,
) -> list[VaeStrategy]:
    """Return `find_vae_strategies`, after evicting cached models if otherwise only the CPU would be left."""
    strategies = find_vae_strategies(config, plan, dims, device, axis, is_encoding=is_encoding)
    # Loading the transformer again takes less time than the VAE on the CPU.
    if strategies[0].name == "cpu" and config.memory.vae is None:
        model_cache.clear()
        strategies = find_vae_strategies(config, plan, dims, device, axis, is_encoding=is_encoding)
    return strategies


@contextmanager
def cudnn_autotuning(dims: VaeDims, strategy: VaeStrategy) -> Iterator[None]:
    """Let cuDNN benchmark a few kernels for each convolution shape where that is faster.

    That takes memory, and a second. Its default choice is 20 % slower where channels are not in
    multiples of 64 (VAE 2.1), and as fast as any where they are (bench/NOTES.md).
    """
    previous_settings = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark = dims.decoder_dim % 64 != 0 and not strategy.is_tight
    torch.backends.cudnn.benchmark_limit = 3
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = previous_settings


def load_vae(
    checkpoint: Checkpoint,
    config: RunConfig,
    strategy: VaeStrategy,
    device: torch.device,
    model_cache: ModelCache,
) -> WanVae:
    """Return the VAE on this strategy's device, from the model cache if it is there."""
    device = torch.device("cpu") if strategy.name == "cpu" else device
    dtype = choose_vae_dtype(device, config)
    return model_cache.get_or_load(
        "vae",
        (device, dtype),
        lambda: checkpoint.vae.load(device, dtype=dtype).optimize_memory_format(),
    )


def encode_video(
    vae: WanVae, make_chunks: Callable[[], Iterable[Tensor]], strategy: VaeStrategy, axis: Axis
) -> Tensor:
    """Return the normalised latents (1, C, T, h, w), float32, of a video in chunks.

    ``make_chunks()`` returns them as `WanVae.encode` takes them, and may be called several times. Raises
    torch.OutOfMemoryError; with the parallel strategy, on every rank of the axis.
    """
    if strategy.name == "tiled":
        return encode_tiles(vae, make_chunks, strategy.num_tiles)
    merged_chunks = _merge_chunks(make_chunks(), strategy.at_once)
    if strategy.name != "parallel":
        return vae.encode(merged_chunks)
    ensure_ranks_can_allocate(strategy.num_bytes, next(vae.parameters()).device, axis)
    if strategy.is_tight:
        probe_input = _make_zeros(
            vae,
            3,
            4 * strategy.at_once,
            _compute_largest_shard(
                next(iter(make_chunks())).shape[3:], axis, vae.dims.spatial_scale
            ),
        )
        if not can_all_ranks_run(
            lambda state: vae.encoder(vae.prepare_frames(probe_input), state), vae, axis
        ):
            raise torch.OutOfMemoryError
    return encode_split_video(vae, merged_chunks, axis)


def _merge_chunks(chunks: Iterable[Tensor], chunks_per_batch: int) -> Iterator[Tensor]:
    """Yield the first chunk, then up to ``chunks_per_batch`` of the others concatenated."""
    iterator = iter(chunks)
    yield next(iterator)
    while chunk_batch := list(itertools.islice(iterator, chunks_per_batch)):
        yield torch.cat(chunk_batch, dim=2) if len(chunk_batch) > 1 else chunk_batch[0]


def decode_latents(
    vae: WanVae, latents: Tensor, convert: FrameConverter, strategy: VaeStrategy, axis: Axis
) -> Iterator[Tensor]:
    """Yield the frames (n, H, W, 3) of latents (C, T, h, w) as they are ready, on the first rank of the axis.

    Raises torch.OutOfMemoryError; with the parallel strategy, on every rank of the axis and before the
    first frame.
    """
    vae.latents_per_chunk = strategy.at_once
    latents = latents.unsqueeze(0)
    if strategy.name == "parallel":
        ensure_ranks_can_allocate(strategy.num_bytes, latents.device, axis)
        probe_input = _make_zeros(
            vae,
            vae.dims.latent_dim,
            strategy.at_once,
            _compute_largest_shard(latents.shape[3:], axis),
        )
        if strategy.is_tight and not can_all_ranks_run(
            lambda state: vae.decoder(probe_input, state), vae, axis
        ):
            raise torch.OutOfMemoryError
        return decode_in_parallel(vae, latents, convert, axis)
    if strategy.name == "tiled":
        return decode_tiles(vae, latents, strategy.num_tiles, convert)
    return (
        convert(frames[0])
        for frames in vae.decode(latents.cpu() if strategy.name == "cpu" else latents)
    )


def _compute_largest_shard(size: Sequence[int], axis: Axis, scale: int = 1) -> list[int]:
    """Return the rows and columns of the largest shard that a rank works on, with its halo."""
    shard_size = list(size)
    split_index = choose_split_dim(*size) - 3
    shard_size[split_index] = (
        max(split_length_evenly(size[split_index] // scale, axis.size)) + 2 * MIN_STRIP_PIXELS
    ) * scale
    return shard_size


def _make_zeros(vae: WanVae, num_channels: int, num_frames: int, size: Sequence[int]) -> Tensor:
    return next(vae.parameters()).new_zeros(1, num_channels, num_frames, *size)


def decode_in_parallel(
    vae: WanVae, latents: Tensor, convert: FrameConverter, axis: Axis
) -> Iterator[Tensor]:
    """Yield the frames of `decode_latents` for latents (1, C, T, h, w), of which each rank decodes its shard.

    The first rank of the axis gathers and yields them; the others yield nothing.
    """
    state, chunks = decode_split_video(vae, latents, axis)
    pixel_lengths = [length * vae.dims.spatial_scale for length in state.shard_lengths]
    for frames in chunks:
        whole_frames = gather_on_first_rank(convert(frames[0]), pixel_lengths, state.dim - 2, axis)
        if whole_frames is not None:
            yield whole_frames


def can_all_ranks_run(
    process_chunk: Callable[[VideoState], Tensor], vae: WanVae, axis: Axis
) -> bool:
    """Whether every rank of the axis has memory for ``process_chunk`` on two chunks of its shard."""

    def process_two_chunks() -> None:
        state = VideoState()
        # The second chunk also needs the frames of the first that the causal layers hold.
        for _ in range(2):
            process_chunk(state)

    return all(probe_memory_by_rank(process_two_chunks, next(vae.parameters()).device, axis))
