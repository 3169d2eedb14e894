"""Ways for the VAE to work on a video, from the fastest to the one that needs the least memory, and what each needs; no torch."""

from dataclasses import dataclass, replace

from wan_dist.models.dims import VaeDims

SCORES_BYTES = 100_000_000
"""Of the middle's attention, whatever the size."""
VALUES_AT_ONCE = 2_900_000
"""Of one rank in one chunk, latent pixels times the width of the last stage: with more, a GPU is not faster."""
_FRAGMENTS = 1.05
"""How much more the allocator holds than there is in tensors."""


@dataclass(frozen=True)
class Way:
    """How the VAE works: parallel, whole, tiled or cpu."""

    name: str
    num_tiles: int = 1
    at_once: int = 1
    """Latent frames that are made, or decoded, at once: more are faster and take more memory."""
    is_tight: bool = False
    """It takes most of the memory that is free."""
    num_bytes: int = 0
    """Of memory that it is predicted to take, without weights."""

    def __str__(self) -> str:
        return f"in {self.num_tiles} tiles" if self.name == "tiled" else "on the CPU" if self.name == "cpu" else self.name

    def part_of(self, length: int, num_ranks: int, dims: VaeDims) -> tuple[int, int]:
        """Return how many of a side's latent pixels are worked on at once, and how many more that begins with, of the largest part."""
        if self.name == "parallel":
            return min(-(-length // num_ranks) + 1, length), 0  # with a few pixels of the neighbours
        part = -(-length // self.num_tiles)
        if self.num_tiles == 1:
            return part, 0
        own = part * (1 + dims.reach // part)  # from the frame's edge on, if that is near: what is there is not given up
        return own, max(0, min(dims.reach if own > part or self.num_tiles == 2 else 2 * dims.reach, length - own))


WHOLE = Way("whole")


def ways_from(name: str, side: int) -> list[Way]:
    """Return the way called ``name`` and those that need less memory, in order; ``side`` is the larger one of the latents."""
    smaller = [*(Way("tiled", number) for number in (2, 4, 6, 8, 16) if side >= 2 * number), Way("cpu")]
    if name == "cpu":
        return smaller[-1:]
    return smaller if name == "tiled" else [Way(name), *smaller]


def ways_that_fit(
    name: str, dims: VaeDims, latent_size: tuple[int, int, int], num_ranks: int, *, free: int, itemsize: int, encode: bool = False
) -> list[Way]:
    """Return the ways from ``name`` on whose need is below ``free`` bytes of GPU memory, the CPU always.

    ``latent_size``: frames, rows and columns; ``itemsize``: bytes of a number. Each way decodes as many latent frames at once as it
    pays to and half of the memory allows.
    """
    larger, smaller = max(latent_size[1:]), min(latent_size[1:])

    def sized(way: Way) -> tuple[Way, int]:
        length, margin = way.part_of(larger, num_ranks, dims)
        each = smaller * (length + margin) * (dims.dim if encode else dims.decoder_dim)
        pays = [number for number in (8, 4, 2) if number < latent_size[0] and number * each <= VALUES_AT_ONCE]
        numbers = [even_part(latent_size[0] - 1, number) for number in pays]
        size = (smaller, length, margin)
        still = latent_size[0] == 1
        needs = {number: vae_bytes(dims, size, itemsize, at_once=number, encode=encode, still=still) for number in (*numbers, 1)}
        at_once = next((number for number in numbers if needs[number] < free // 2), 1)
        return replace(way, at_once=at_once, is_tight=needs[at_once] > free // 2, num_bytes=needs[at_once]), needs[at_once]

    *on_gpu, cpu = ways_from(name, larger)
    return [way for way, need in map(sized, on_gpu) if need < free / _FRAGMENTS] + [cpu]


def even_part(whole: int, most: int) -> int:
    """Return ``most`` or the largest number above half of it that divides ``whole``, so that all parts are of one size."""
    return next((number for number in range(most, most // 2, -1) if whole % number == 0), most)


def vae_bytes(
    dims: VaeDims, size: tuple[int, int, int], itemsize: int, *, at_once: int = 1, encode: bool = False, still: bool = False
) -> int:
    """Return about how much memory the VAE takes, without weights, whatever the number of frames.

    ``size``: the latent pixels of its part of a frame, on the smaller side and on the larger one, and how many more on the larger one
    it begins with; ``still``: there is one frame. That is what causal layers remember, two frames of each input, and the arrays of a
    chunk where they are largest.
    """
    values = (_encoded_values if encode else _decoded_values)(dims, size, at_once, still=still)
    if itemsize == 2:  # kernels for what is not yet doubled, beside those they are made of
        values += sum(16 * (dims.decoder_dim * each) ** 2 // (1 if dims.residual else 2) for each in dims.multipliers[1:])
    else:  # there are no kernels for float32, so norms and activations have arrays of their own
        base, margin = (dims.dim, size[2]) if encode else (dims.decoder_dim, 0)
        arrays = 3 * 4 * at_once if not still else 1 if encode else 3  # not all of them at an image's largest moment
        values += arrays * base * size[0] * (size[1] + margin) * 4 ** len(dims.temporal)
    return values * itemsize + SCORES_BYTES


def _decoded_values(dims: VaeDims, size: tuple[int, int, int], frames: int, *, still: bool) -> int:
    """Return how many numbers a decoder remembers, and has in its arrays at their largest, in the order of models/vae.py."""
    rows, columns, margin = size
    sides = 2 if margin > dims.reach else 1
    area = rows * (columns + margin)
    remembered, most = 2 * area * (dims.latent_dim + 4 * dims.decoder_stages[0][0]), 0
    for stage, (before, after) in enumerate(dims.decoder_stages):
        area = rows * (columns + margin)
        remembered += 2 * area * (before + after + 2 * after * dims.num_blocks)
        arrays = [_block_values(before, after, frames), _block_values(after, after, frames)]
        if stage < len(dims.temporal):
            kept = before * frames if dims.residual else 0  # for the shortcut around the stage
            arrays[1] += kept
            if dims.temporal[::-1][stage] and not still:
                remembered += 2 * area * after
                arrays.append(kept + after * frames * (1 + 2 + 2))
                frames *= 2
            out = after if dims.residual else after // 2
            arrays.append(kept + frames * (after + 4 * out + 4 * out))  # before it is doubled, doubled in parts, and doubled
        most = max(most, area * max(arrays) + (remembered - 2 * area * after if still else 0))
        if stage < len(dims.temporal):
            rows, columns, margin = 2 * rows, 2 * columns, max(0, 2 * (margin - sides * (2 * dims.num_blocks + 3)))  # a tile shrinks
    area = rows * (columns + margin)
    last = area * (after * (2 * frames + 2) + 4 * dims.pixel_channels * frames)
    return max(most, remembered + last) if still else remembered + 2 * area * after + max(most, last)


def _encoded_values(dims: VaeDims, size: tuple[int, int, int], at_once: int, *, still: bool) -> int:
    """Return the same for an encoder."""
    rows, columns, margin = size
    scale, frames = 2 ** len(dims.temporal), 1 if still else 4 * at_once
    area = rows * (columns + margin) * scale**2
    remembered, most = 2 * area * dims.pixel_channels, 0
    for stage, (before, after) in enumerate(dims.encoder_stages):
        remembered += 2 * area * (before + after + 2 * after * (dims.num_blocks - 1))
        kept = before * frames if dims.residual else 0
        arrays = [_block_values(before, after, frames), kept + _block_values(after, after, frames)]
        if stage < len(dims.temporal):
            arrays.append(kept + 2 * after * frames)  # padded
        most = max(most, area * max(arrays) + (remembered - 2 * area * after if still else 0))
        if stage < len(dims.temporal):
            area //= 4
            if dims.temporal[stage] and not still:
                remembered += area * after
                frames //= 2
    return most if still else remembered + most


def _block_values(before: int, after: int, frames: int) -> int:
    """Return the numbers for each pixel of a residual block: its input, a convolution's padded input and result."""
    return before * frames + max(before * (frames + 2) + after * frames, after * (frames + 2) + after * frames)
