"""Noise of a video's latents."""

from collections.abc import Callable

import torch
from torch import Tensor


class NoiseSource:
    """Standard normal noise, tensor after tensor from one generator.

    ``shape``: of the latents (C, T, h, w). A CPU generator gives the same noise on every machine; a CUDA one
    gives the reference's noise on a GPU. ``frames_first``: numbers are drawn in the order of (T, C, h, w), as
    in FastWan's and CausVid's samplers. ``share`` returns one rank's noise on all ranks, on their devices.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        seed: int,
        device: str = "cpu",
        frames_first: bool = False,
        share: Callable[[Tensor], Tensor] = lambda noise: noise,
    ) -> None:
        self.shape, self.frames_first, self.share = shape, frames_first, share
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self) -> Tensor:
        """Return the next noise (1, C, T, h, w), float32."""
        return self.share(self._draw(self.shape)).unsqueeze(0)

    def skip(self, num_draws: int, shape: tuple[int, int, int, int] | None = None) -> None:
        """Draw and forget, so that the noise after it is that of a run which drew as much.

        ``shape``: of what is drawn, if it is another one.
        """
        for _ in range(num_draws):
            self._draw(shape or self.shape)

    def _draw(self, shape: tuple[int, int, int, int]) -> Tensor:
        channels, frames, *size = shape
        drawn_shape = (frames, channels, *size) if self.frames_first else shape
        noise = torch.randn(
            drawn_shape,
            generator=self.generator,
            device=self.generator.device,
            dtype=torch.float32,
        )
        return noise.transpose(0, 1).contiguous() if self.frames_first else noise
