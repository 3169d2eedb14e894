"""VAE strategies, from the fastest to the one with the least memory, and the memory of each; no torch."""

from dataclasses import dataclass, replace

from wan_dist.models.dims import VaeDims

ATTENTION_SCORE_BYTES = 100_000_000
"""Bytes of the middle block's attention scores, whatever the size of the video."""
MAX_CHUNK_VALUES = 2_900_000
"""Values of a rank in a chunk, latent pixels times the last stage's width; with more, a GPU is not faster."""
_FRAGMENTATION_FACTOR = 1.05
"""Memory that the allocator holds, as a multiple of that of its tensors."""


@dataclass(frozen=True)
class VaeStrategy:
    """How the VAE encodes or decodes: parallel, whole, tiled or cpu."""

    name: str
    num_tiles: int = 1
    at_once: int = 1
    """Latent frames that are encoded or decoded at once: more are faster and take more memory."""
    is_tight: bool = False
    """Whether it takes more than half of the free memory."""
    num_bytes: int = 0
    """Memory that it is predicted to take, without weights."""

    def __str__(self) -> str:
        if self.name == "tiled":
            return f"in {self.num_tiles} tiles"
        return "on the CPU" if self.name == "cpu" else self.name

    def compute_largest_part(self, length: int, num_ranks: int, dims: VaeDims) -> tuple[int, int]:
        """Return the latent pixels along a side of the largest part, and the extra ones of its overlap.

        ``length``: latent pixels of the whole side. A tile starts with the extra pixels and loses them from
        stage to stage.
        """
        if self.name == "parallel":  # with the halo: a few pixels of the neighbours
            return min(-(-length // num_ranks) + 1, length), 0
        part_length = -(-length // self.num_tiles)
        if self.num_tiles == 1:
            return part_length, 0
        # A tile near the frame's edge starts at the edge, and its overlap there is not cut off.
        own_length = part_length * (1 + dims.tile_overlap // part_length)
        has_one_overlap = own_length > part_length or self.num_tiles == 2
        overlap = dims.tile_overlap if has_one_overlap else 2 * dims.tile_overlap
        return own_length, max(0, min(overlap, length - own_length))


WHOLE_VAE = VaeStrategy("whole")


def list_vae_strategies(name: str, larger_side: int) -> list[VaeStrategy]:
    """Return the strategy ``name`` and those that need less memory, in order.

    ``larger_side``: the larger of the latents' height and width.
    """
    leaner_strategies = [
        *(
            VaeStrategy("tiled", num_tiles)
            for num_tiles in (2, 4, 6, 8, 16)
            if larger_side >= 2 * num_tiles
        ),
        VaeStrategy("cpu"),
    ]
    if name == "cpu":
        return leaner_strategies[-1:]
    return leaner_strategies if name == "tiled" else [VaeStrategy(name), *leaner_strategies]


def find_fitting_strategies(
    name: str,
    dims: VaeDims,
    latent_size: tuple[int, int, int],
    num_ranks: int,
    *,
    free_bytes: int,
    itemsize: int,
    encode: bool = False,
) -> list[VaeStrategy]:
    """Return the strategies from ``name`` on that fit into ``free_bytes`` of GPU memory; the CPU always.

    ``latent_size``: frames, rows and columns; ``itemsize``: bytes of a number. Each strategy encodes or
    decodes as many latent frames at once as make it faster and half of the memory allows.
    """
    larger_side, smaller_side = max(latent_size[1:]), min(latent_size[1:])

    def choose_chunk_size(strategy: VaeStrategy) -> tuple[VaeStrategy, int]:
        length, margin = strategy.compute_largest_part(larger_side, num_ranks, dims)
        values_per_frame = (
            smaller_side * (length + margin) * (dims.dim if encode else dims.decoder_dim)
        )
        worthwhile_counts = [
            num_frames
            for num_frames in (8, 4, 2)
            if num_frames < latent_size[0] and num_frames * values_per_frame <= MAX_CHUNK_VALUES
        ]
        frame_counts = [
            choose_even_part(latent_size[0] - 1, num_frames) for num_frames in worthwhile_counts
        ]
        part_size = (smaller_side, length, margin)
        is_still = latent_size[0] == 1
        bytes_by_count = {
            num_frames: estimate_vae_bytes(
                dims, part_size, itemsize, at_once=num_frames, encode=encode, is_still=is_still
            )
            for num_frames in (*frame_counts, 1)
        }
        at_once = next(
            (
                num_frames
                for num_frames in frame_counts
                if bytes_by_count[num_frames] < free_bytes // 2
            ),
            1,
        )
        return replace(
            strategy,
            at_once=at_once,
            is_tight=bytes_by_count[at_once] > free_bytes // 2,
            num_bytes=bytes_by_count[at_once],
        ), bytes_by_count[at_once]

    *gpu_strategies, cpu_strategy = list_vae_strategies(name, larger_side)
    return [
        strategy
        for strategy, needed_bytes in map(choose_chunk_size, gpu_strategies)
        if needed_bytes < free_bytes / _FRAGMENTATION_FACTOR
    ] + [cpu_strategy]


def choose_even_part(total: int, max_part: int) -> int:
    """Return the largest divisor of ``total`` up to ``max_part`` and above half of it, else ``max_part``.

    With a divisor, all parts are of one size.
    """
    return next(
        (part for part in range(max_part, max_part // 2, -1) if total % part == 0), max_part
    )


def estimate_vae_bytes(
    dims: VaeDims,
    part_size: tuple[int, int, int],
    itemsize: int,
    *,
    at_once: int = 1,
    encode: bool = False,
    is_still: bool = False,
) -> int:
    """Return the approximate memory of the VAE in bytes, without weights, whatever the number of frames.

    ``part_size``: latent pixels of its part of a frame, on the smaller side and on the larger one, and the
    extra ones of overlap that it starts with on the larger one; ``is_still``: there is one frame. Counted are
    the caches of causal layers, two frames of each input, and the arrays of a chunk where they are largest.
    """
    values = (_count_encoder_values if encode else _count_decoder_values)(
        dims, part_size, at_once, is_still=is_still
    )
    if (
        itemsize == 2
    ):  # phase kernels, which convolve before upsampling, and those they are folded from
        values += sum(
            16 * (dims.decoder_dim * multiplier) ** 2 // (1 if dims.residual else 2)
            for multiplier in dims.multipliers[1:]
        )
    else:  # there are no fused kernels for float32, so norms and activations have arrays of their own
        base_dim, margin = (dims.dim, part_size[2]) if encode else (dims.decoder_dim, 0)
        num_arrays = 3 * 4 * at_once
        if is_still:  # not all of them are alive at an image's peak
            num_arrays = 1 if encode else 3
        values += (
            num_arrays * base_dim * part_size[0] * (part_size[1] + margin) * 4 ** len(dims.temporal)
        )
    return values * itemsize + ATTENTION_SCORE_BYTES


def _count_decoder_values(
    dims: VaeDims, part_size: tuple[int, int, int], num_frames: int, *, is_still: bool
) -> int:
    """Return the values in a decoder's caches and arrays at the peak, in the order of models/vae/model.py."""
    rows, columns, margin = part_size
    num_tile_edges = 2 if margin > dims.tile_overlap else 1
    area = rows * (columns + margin)
    cached_values, peak_values = 2 * area * (dims.latent_dim + 4 * dims.decoder_stages[0][0]), 0
    for stage, (in_dim, out_dim) in enumerate(dims.decoder_stages):
        area = rows * (columns + margin)
        cached_values += 2 * area * (in_dim + out_dim + 2 * out_dim * dims.num_blocks)
        array_values = [
            _count_block_values(in_dim, out_dim, num_frames),
            _count_block_values(out_dim, out_dim, num_frames),
        ]
        if stage < len(dims.temporal):
            # The input stays for the shortcut around the stage.
            shortcut_values = in_dim * num_frames if dims.residual else 0
            array_values[1] += shortcut_values
            if dims.temporal[::-1][stage] and not is_still:
                cached_values += 2 * area * out_dim
                array_values.append(shortcut_values + out_dim * num_frames * (1 + 2 + 2))
                num_frames *= 2
            upsampled_dim = out_dim if dims.residual else out_dim // 2
            # The array before it is doubled, doubled in parts, and doubled.
            array_values.append(
                shortcut_values + num_frames * (out_dim + 4 * upsampled_dim + 4 * upsampled_dim)
            )
        peak_values = max(
            peak_values,
            area * max(array_values) + (cached_values - 2 * area * out_dim if is_still else 0),
        )
        if stage < len(dims.temporal):
            rows, columns = 2 * rows, 2 * columns
            # A tile shrinks by the pixels that its convolutions have used up at each edge.
            margin = max(0, 2 * (margin - num_tile_edges * (2 * dims.num_blocks + 3)))
    area = rows * (columns + margin)
    final_values = area * (out_dim * (2 * num_frames + 2) + 4 * dims.pixel_channels * num_frames)
    return (
        max(peak_values, cached_values + final_values)
        if is_still
        else cached_values + 2 * area * out_dim + max(peak_values, final_values)
    )


def _count_encoder_values(
    dims: VaeDims, part_size: tuple[int, int, int], at_once: int, *, is_still: bool
) -> int:
    """Return the values in an encoder's caches and arrays at the peak."""
    rows, columns, margin = part_size
    scale, num_frames = 2 ** len(dims.temporal), 1 if is_still else 4 * at_once
    area = rows * (columns + margin) * scale**2
    cached_values, peak_values = 2 * area * dims.pixel_channels, 0
    for stage, (in_dim, out_dim) in enumerate(dims.encoder_stages):
        cached_values += 2 * area * (in_dim + out_dim + 2 * out_dim * (dims.num_blocks - 1))
        shortcut_values = in_dim * num_frames if dims.residual else 0
        array_values = [
            _count_block_values(in_dim, out_dim, num_frames),
            shortcut_values + _count_block_values(out_dim, out_dim, num_frames),
        ]
        if stage < len(dims.temporal):
            array_values.append(shortcut_values + 2 * out_dim * num_frames)  # padded
        peak_values = max(
            peak_values,
            area * max(array_values) + (cached_values - 2 * area * out_dim if is_still else 0),
        )
        if stage < len(dims.temporal):
            area //= 4
            if dims.temporal[stage] and not is_still:
                cached_values += area * out_dim
                num_frames //= 2
    return peak_values if is_still else cached_values + peak_values


def _count_block_values(in_dim: int, out_dim: int, num_frames: int) -> int:
    """Return the values per pixel of a residual block: input, a convolution's padded input, its result."""
    return in_dim * num_frames + max(
        in_dim * (num_frames + 2) + out_dim * num_frames,
        out_dim * (num_frames + 2) + out_dim * num_frames,
    )
