"""What the layers of the VAE remember of earlier frames, and the halos of a part of a frame."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class VideoState:
    """One video's pass through an encoder or decoder, or that of a part of its rows or columns.

    ``past`` holds for each causal layer the last frames of its input so far; empty: the next chunk starts the video. The methods are
    the seam for a part: a layer that looks at neighbouring pixels asks for them and cuts off what it made of them. Here nobody gives
    any, so a part shrinks from layer to layer by what its layers see: a tile, which begins with more than it is to end with.
    """

    has_neighbours: bool = False
    """Whether other ranks give the pixels beyond this part's."""

    def __init__(self, dim: int = 4, *, has_before: bool = False, has_after: bool = False) -> None:
        self.dim, self.has_before, self.has_after = dim, has_before, has_after
        self.past_frames: dict[nn.Module, Tensor | None] = {}

    def exchange_halos(
        self, x: Tensor, num_pixels: int
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Begin to trade ``num_pixels`` rows or columns of x (B, C, F, H, W) on each side; the call waits for the neighbours'."""
        return lambda: (None, None)

    def count_halo_pixels(self, num_pixels: int) -> tuple[int, int]:
        """Return how many of ``num_pixels`` rows or columns come from the neighbour before and from the one after."""
        before, after = (
            self.has_neighbours and has_side for has_side in (self.has_before, self.has_after)
        )
        return num_pixels * before, num_pixels * after

    def attach_halos(self, x: Tensor, num_pixels: int) -> Tensor:
        """Return x (B, C, F, H, W) with ``num_pixels`` rows or columns more on each side that has a neighbour."""
        if not self.has_neighbours:
            return x
        before, after = self.exchange_halos(x, num_pixels)()
        return torch.cat([part for part in (before, x, after) if part is not None], dim=self.dim)

    def trim_halos(self, x: Tensor, num_pixels: int) -> Tensor:
        """Cut ``num_pixels`` rows or columns off on each side that is not the frame's own."""
        if not (self.has_before or self.has_after):
            return x
        start = num_pixels * self.has_before
        return x.narrow(self.dim, start, x.shape[self.dim] - start - num_pixels * self.has_after)

    def crop_to_interior(self, x: Tensor, num_pixels: int) -> Tensor:
        """Return the part of x that is left of it after layers that see ``num_pixels``."""
        return x if self.has_neighbours else self.trim_halos(x, num_pixels)

    def gather_whole(self, x: Tensor) -> Tensor:
        """Return x with the rows and columns of all ranks."""
        return x
