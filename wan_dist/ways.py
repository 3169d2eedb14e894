"""Ways for the VAE to work on a video, from the fastest to the one that needs the least memory, and what each needs; no torch."""

from dataclasses import dataclass, replace

from wan_dist.degrees import MIN_STRIP
from wan_dist.dims import VaeDims

SCORES_BYTES = 100_000_000
"""Of the middle's attention, whatever the size."""
PIXELS_AT_ONCE = 30_000
"""Latent pixels of one rank in one chunk: with more, a GPU is not faster."""


@dataclass(frozen=True)
class Way:
    """How the VAE works: parallel, whole, tiled or cpu."""

    name: str
    num_tiles: int = 1
    at_once: int = 1
    """Latent frames that are made, or decoded, at once: more are faster and take more memory."""
    is_tight: bool = False
    """It takes most of the memory that is free."""

    def __str__(self) -> str:
        return f"in {self.num_tiles} tiles" if self.name == "tiled" else "on the CPU" if self.name == "cpu" else self.name

    def part_of(self, length: int, num_ranks: int, dims: VaeDims) -> tuple[int, int]:
        """Return how many of a side's latent pixels are worked on at once, and how many more that begins with."""
        if self.name == "parallel":
            return min(-(-length // num_ranks) + 2 * MIN_STRIP, length), 0
        part = -(-length // self.num_tiles)
        return part, min(2 * dims.reach if self.num_tiles > 1 else 0, length - part)


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
        numbers = [number for number in (8, 4, 2) if number < latent_size[0] and number * smaller * (length + margin) <= PIXELS_AT_ONCE]
        size = (smaller, length, margin)
        needs = {number: vae_bytes(dims, size, itemsize, at_once=number, encode=encode) for number in (*numbers, 1)}
        at_once = next((number for number in numbers if needs[number] < free // 2), 1)
        return replace(way, at_once=at_once, is_tight=needs[at_once] > free // 2), needs[at_once]

    *on_gpu, cpu = ways_from(name, larger)
    return [way for way, need in map(sized, on_gpu) if need < free] + [cpu]


def vae_bytes(dims: VaeDims, size: tuple[int, int, int], itemsize: int, *, at_once: int = 1, encode: bool = False) -> int:
    """Return about how much memory the VAE takes, without weights, whatever the number of frames.

    ``size``: the latent pixels of its part of a frame, on the smaller side and on the larger one, and how many more on the larger one
    it begins with. That is what causal layers remember, two frames of each input, and the arrays of a chunk at the largest stage, about
    three and some frames: a block's input, its padded copy and the convolution's result. Measured peaks are in bench/NOTES.md.
    """
    rows, columns, margin = size
    base = dims.dim if encode else dims.decoder_dim
    num_blocks = dims.num_blocks if encode else dims.num_blocks + 1
    remembered = 2 * rows * (columns + margin) * (dims.latent_dim + 4 * base * dims.multipliers[-1])
    for multiplier in reversed(dims.multipliers):
        width = base * multiplier
        full_size = rows * (columns + margin) * width
        remembered += 4 * full_size * num_blocks
        rows, columns, margin = 2 * rows, 2 * columns, 2 * margin
        if not encode:
            margin = max(0, margin - 4 * (2 * num_blocks + 1))  # a tile shrinks
    return (remembered + (12 * at_once + 6) * full_size) * itemsize + SCORES_BYTES
