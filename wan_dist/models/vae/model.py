"""Wan video VAEs, causal in time, which decode and encode in chunks of frames.

VAE 2.1 compresses 4 x 8 x 8 into 16 channels; VAE 2.2 compresses 4 x 16 x 16 into 48, with 2 x 2 blocks of
pixels as input channels and shortcuts around its stages.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from wan_dist.models.dims import VaeDims
from wan_dist.models.vae import ops
from wan_dist.models.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    DownStage,
    ResidualBlock,
    RMSNorm,
    Upsample,
    UpStage,
    patchify_pixels,
    prepare_conv_input,
    unpatchify_pixels,
)
from wan_dist.models.vae.video_state import VideoState

# Mean and standard deviation of each latent channel over the training data, by the number of channels, from
# the published Diffusers-layout vae/config.json.
LATENT_MEAN = {
    16: (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    48: (
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
}
LATENT_STD = {
    16: (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
    48: (
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}


class Encoder(nn.Module):
    """Encoder: frames to latent moments."""

    def __init__(self, dims: VaeDims, dtype: torch.dtype) -> None:
        super().__init__()
        stages = dims.encoder_stages
        self.conv1 = CausalConv3d(dims.pixel_channels, stages[0][0], 3, dtype)
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(stages):
            blocks: list[nn.Module] = [
                ResidualBlock(in_dim if block_index == 0 else out_dim, out_dim, dtype)
                for block_index in range(dims.num_blocks)
            ]
            has_downsample = stage < len(dims.temporal)
            temporal = has_downsample and dims.temporal[stage]
            if has_downsample:
                blocks.append(Downsample(out_dim, temporal=temporal, dtype=dtype))
            if dims.residual:
                blocks = [
                    DownStage(blocks, out_dim, temporal=1 + temporal, spatial=1 + has_downsample)
                ]
            layers += blocks
        self.downsamples = nn.ModuleList(layers)
        self.middle = _build_middle(stages[-1][1], dtype)
        self.head = _build_head(stages[-1][1], 2 * dims.latent_dim, dtype)

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """Encode a chunk (B, pixel channels, F, H, W) -> (B, 2 C, f, H / 8, W / 8).

        f is 1 for the video's first frame, which is a chunk of its own, F / 4 afterwards.
        """
        return self.compute_moments(self.compute_features(x, state), state)

    def compute_features(self, x: Tensor, state: VideoState) -> Tensor:
        """Apply the layers that see only a few neighbouring pixels.

        (B, pixel channels, F, H, W) -> (B, D, f, H / 8, W / 8).
        """
        x = state.trim_halos(self.conv1(state.attach_halos(x, 1), state), 1)
        for layer in self.downsamples:
            x = layer(x, state)
        return x

    def compute_moments(self, x: Tensor, state: VideoState) -> Tensor:
        """Apply the other layers, with attention over a whole frame: (B, D, f, h, w) -> (B, 2 C, f, h, w)."""
        for layer in self.middle:
            x = layer(x, state)
        return _apply_head(self.head, x, state)


class Decoder(nn.Module):
    """Decoder: latents to frames."""

    def __init__(self, dims: VaeDims, dtype: torch.dtype) -> None:
        super().__init__()
        stages = dims.decoder_stages
        self.conv1 = CausalConv3d(dims.latent_dim, stages[0][0], 3, dtype)
        self.middle = _build_middle(stages[0][0], dtype)
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(stages):
            blocks: list[nn.Module] = [
                ResidualBlock(in_dim if block_index == 0 else out_dim, out_dim, dtype)
                for block_index in range(dims.num_blocks + 1)
            ]
            if stage < len(dims.temporal):
                temporal = dims.temporal[::-1][stage]
                upsampled_dim = out_dim if dims.residual else out_dim // 2
                blocks.append(Upsample(out_dim, upsampled_dim, temporal=temporal, dtype=dtype))
                if dims.residual:
                    blocks = [UpStage(blocks, out_dim, temporal=1 + temporal)]
            elif dims.residual:
                blocks = [_LastStage(blocks)]
            layers += blocks
        self.upsamples = nn.ModuleList(layers)
        self.head = _build_head(stages[-1][1], dims.pixel_channels, dtype)

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """Decode a chunk (B, C, f, h, w) -> (B, pixel channels, F, 8 h, 8 w).

        F is 1 for the video's first latent frame, which is a chunk of its own, 4 f afterwards.
        """
        return self.compute_frames(self.compute_features(x, state), state)

    def compute_features(self, x: Tensor, state: VideoState) -> Tensor:
        """Apply the layers at the latents' own size, with attention over a whole frame.

        (B, C, f, h, w) -> (B, D, f, h, w).
        """
        x = state.trim_halos(self.conv1(state.attach_halos(x, 1), state), 1)
        for layer in self.middle:
            x = layer(x, state)
        return x

    def compute_frames(self, x: Tensor, state: VideoState) -> Tensor:
        """Apply the other layers, which see at most `VaeDims.tile_overlap` neighbouring latent pixels.

        (B, D, f, h, w) -> (B, pixel channels, F, 8 h, 8 w).
        """
        for layer in self.upsamples:
            x = layer(x, state)
        return _apply_head(self.head, x, state)


class _LastStage(nn.Module):
    """Last decoder stage of VAE 2.2, without a shortcut; nested as its names in the checkpoint need it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        for layer in self.upsamples:
            x = layer(x, state)
        return x


def _build_middle(dim: int, dtype: torch.dtype) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(dim, dim, dtype), AttentionBlock(dim, dtype), ResidualBlock(dim, dim, dtype)]
    )


def _build_head(in_dim: int, out_dim: int, dtype: torch.dtype) -> nn.ModuleList:
    return nn.ModuleList([RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, dtype)])


def _apply_head(head: nn.ModuleList, x: Tensor, state: VideoState) -> Tensor:
    norm, _, conv = head
    assert isinstance(conv, CausalConv3d)
    return state.trim_halos(
        conv.convolve_buffer(prepare_conv_input(norm, conv, x, state, num_halo_pixels=1), state), 1
    )


def split_frames_into_chunks(video: Tensor) -> Iterator[Tensor]:
    """Yield a video's frames (B, 3, F, H, W) as the encoder takes them: the first, then four at a time."""
    yield video[:, :, :1]
    if video.shape[2] > 1:
        yield from video[:, :, 1:].split(4, dim=2)


class WanVae(nn.Module):
    """Wan video VAE: encoder and decoder.

    Latents are normalised channel by channel to the scale on which the transformer was trained.
    """

    def __init__(self, dims: VaeDims, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dims = dims
        self.dtype = dtype
        self.latents_per_chunk = 1
        """Latent frames that are decoded at once, after the first: more are faster but take more memory."""
        self.encoder = Encoder(dims, dtype)
        self.conv1 = CausalConv3d(2 * dims.latent_dim, 2 * dims.latent_dim, 1, dtype)
        self.conv2 = CausalConv3d(dims.latent_dim, dims.latent_dim, 1, dtype)
        self.decoder = Decoder(dims, dtype)

    def get_latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each latent channel, (1, C, 1, 1, 1).

        Their device and dtype are those of ``like``.
        """
        mean, std = (
            like.new_tensor(table[self.dims.latent_dim]) for table in (LATENT_MEAN, LATENT_STD)
        )
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def optimize_memory_format(self) -> "WanVae":
        """Convert the weights to the fastest memory format on a GPU in half precision; return the VAE itself.

        On other devices and in float32, nothing changes.
        """
        if self.dtype == torch.float32 or not ops.is_on_gpu(self.conv1.weight):
            return self
        for parameter in self.parameters():
            if parameter.dim() in (4, 5):
                memory_format = (
                    torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                )
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        for layer in self.modules():
            if isinstance(layer, Upsample):
                layer.prepare_phase_weight()
        return self

    def encode(self, chunks: Iterable[Tensor], state: VideoState | None = None) -> Tensor:
        """Return the normalised mean latents (B, C, T, h, w), float32, of a video.

        chunks (B, 3, n, H, W) in [-1, 1]: n is 1 for the first chunk, a multiple of 4 for the others; H and W
        are multiples of the compression. Memory does not grow with the number of frames.
        """
        state = state or VideoState()
        features = (
            self.encoder.compute_features(self.prepare_frames(chunk), state) for chunk in chunks
        )
        return self.compute_latents(features, state)

    def prepare_frames(self, chunk: Tensor) -> Tensor:
        """Return the encoder's input for frames (B, 3, n, H, W) in [-1, 1]."""
        pixels = patchify_pixels(chunk) if self.dims.residual else chunk
        return pixels.to(self.dtype, memory_format=self._choose_memory_format(chunk))

    def compute_latents(self, features: Iterable[Tensor], state: VideoState) -> Tensor:
        """Return the normalised mean latents (B, C, T, h, w), float32.

        ``features`` are the results of `Encoder.compute_features` for each chunk.
        """
        moments_by_chunk = (
            self.conv1(self.encoder.compute_moments(chunk_features, state), state)
            for chunk_features in features
        )
        latents = torch.cat(
            [chunk_moments.float().chunk(2, dim=1)[0] for chunk_moments in moments_by_chunk], dim=2
        )
        mean, std = self.get_latent_statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor, state: VideoState | None = None) -> Iterator[Tensor]:
        """Yield the frames (B, 3, n, H, W), float32 in [-1, 1], of normalised latents (B, C, T, h, w).

        n is 1 for the first latent frame, 4 for each of the others; after the first, `latents_per_chunk`
        latent frames are decoded together. Memory does not grow with T.
        """
        state = state or VideoState()
        for latent in self.denormalize_latents(latents):
            yield self.restore_frames(self.decoder(latent, state))

    def denormalize_latents(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the decoder's input for normalised latents (B, C, T, h, w).

        The first latent frame is alone; then each chunk has `latents_per_chunk` of them.
        """
        mean, std = self.get_latent_statistics(latents.float())
        first_latent, later_latents = latents[:, :, :1], latents[:, :, 1:]
        has_later = later_latents.shape[2] > 0
        later_chunks = later_latents.split(self.latents_per_chunk, dim=2) if has_later else ()
        for latent in (first_latent, *later_chunks):
            yield self.conv2(
                (latent * std + mean).to(
                    self.dtype, memory_format=self._choose_memory_format(latent)
                ),
                VideoState(),
            )

    def restore_frames(self, decoded: Tensor) -> Tensor:
        """Return the decoder's output as frames (B, 3, n, H, W), float32 in [-1, 1]."""
        return (unpatchify_pixels(decoded) if self.dims.residual else decoded).float().clamp(-1, 1)

    def _choose_memory_format(self, x: Tensor) -> torch.memory_format:
        return (
            torch.channels_last_3d
            if ops.is_on_gpu(x) and self.dtype != torch.float32
            else torch.contiguous_format
        )
