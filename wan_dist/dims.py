"""Hyperparameters of the models, as read off a checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VaeDims:
    """The VAE."""

    dim: int
    decoder_dim: int
    latent_dim: int = 16
    residual: bool = False
    """VAE 2.2: shortcuts around the stages, and pixels in 2 x 2 blocks."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    """Which of the encoder's downsamplings halve the frames too; the decoder's doublings mirror it."""

    @property
    def reach(self) -> int:
        """How many latent pixels more a tile needs, on each side inside the frame, than it makes frames of."""
        pixels = 0
        for _ in self.temporal:
            pixels = 2 * (pixels + 2 * (self.num_blocks + 1) + 1)  # a stage's blocks, and the upsampling after it
        return -(-(pixels + 2 * (self.num_blocks + 1) + 1) // 2 ** len(self.temporal))  # the last stage's, and the head

    @property
    def scale(self) -> int:
        """Pixels of a video for a latent pixel, on a side."""
        return 2 ** len(self.temporal) * (2 if self.residual else 1)

    @property
    def pixel_channels(self) -> int:
        """Channels of the encoder's input and of the decoder's output."""
        return 12 if self.residual else 3
