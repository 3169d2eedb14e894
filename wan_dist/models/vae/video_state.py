"""State of the VAE's causal layers (past frames), and the halos of a part of a frame."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class VideoState:
    """State of one video, or of a part of its rows or columns, in an encoder or decoder.

    ``past_frames`` has for each causal layer the last frames of its input so far; empty: the next chunk
    starts the video. The methods exchange and trim halos: a layer that sees neighbouring pixels requests
    them, and trims its outputs at their places. In this class there are no neighbours that send any, so a
    part shrinks in each layer by what the layer sees: this is a tile, whose input is larger than its output.
    ``dim`` is the split dimension: 3 for rows, 4 for columns. ``has_before`` and ``has_after`` say on which
    sides the frame continues beyond this part.
    """

    has_neighbours: bool = False
    """Whether other ranks send the pixels beyond this part."""

    def __init__(self, dim: int = 4, *, has_before: bool = False, has_after: bool = False) -> None:
        self.dim, self.has_before, self.has_after = dim, has_before, has_after
        self.past_frames: dict[nn.Module, Tensor | None] = {}

    def exchange_halos(
        self, x: Tensor, num_pixels: int
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Start the exchange of ``num_pixels`` rows or columns of x (B, C, F, H, W) on each side.

        The returned call waits for the halos of the neighbours before and after; None where there is none.
        """
        return lambda: (None, None)

    def count_halo_pixels(self, num_pixels: int) -> tuple[int, int]:
        """Return how many rows or columns come from the neighbours before and after: ``num_pixels`` or 0."""
        before, after = (
            self.has_neighbours and has_side for has_side in (self.has_before, self.has_after)
        )
        return num_pixels * before, num_pixels * after

    def attach_halos(self, x: Tensor, num_pixels: int) -> Tensor:
        """Return x (B, C, F, H, W) with a halo of ``num_pixels`` on each side that has a neighbour."""
        if not self.has_neighbours:
            return x
        before, after = self.exchange_halos(x, num_pixels)()
        return torch.cat([part for part in (before, x, after) if part is not None], dim=self.dim)

    def trim_halos(self, x: Tensor, num_pixels: int) -> Tensor:
        """Trim ``num_pixels`` rows or columns on each side that is not a border of the frame."""
        if not (self.has_before or self.has_after):
            return x
        start = num_pixels * self.has_before
        return x.narrow(self.dim, start, x.shape[self.dim] - start - num_pixels * self.has_after)

    def crop_to_interior(self, x: Tensor, num_pixels: int) -> Tensor:
        """Return the part of x that remains after layers that see ``num_pixels`` neighbouring pixels."""
        return x if self.has_neighbours else self.trim_halos(x, num_pixels)

    def gather_whole(self, x: Tensor) -> Tensor:
        """Return x with the rows and columns of all ranks."""
        return x
