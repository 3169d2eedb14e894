"""Hyperparameters of the models, as read from a checkpoint."""

import itertools
from dataclasses import dataclass, field
from math import prod
from operator import mul


@dataclass(frozen=True, kw_only=True)
class VaeDims:
    """Hyperparameters of the VAE."""

    dim: int
    decoder_dim: int
    latent_dim: int = 16
    residual: bool = False
    """Whether this is VAE 2.2: shortcuts around the stages, and pixels in 2 x 2 blocks."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    """Which of the encoder's downsamplings halve the frames too; the decoder's upsamplings mirror it."""

    @property
    def encoder_stages(self) -> list[tuple[int, int]]:
        """Channels before and after each of the encoder's stages."""
        return list(
            itertools.pairwise(self.dim * multiplier for multiplier in (1, *self.multipliers))
        )

    @property
    def decoder_stages(self) -> list[tuple[int, int]]:
        """Channels before and after each of the decoder's stages.

        In VAE 2.1 the upsampling between two stages halves the channels.
        """
        widths = (
            self.decoder_dim * multiplier
            for multiplier in (self.multipliers[-1], *reversed(self.multipliers))
        )
        return [
            (before // 2 if stage and not self.residual else before, after)
            for stage, (before, after) in enumerate(itertools.pairwise(widths))
        ]

    @property
    def tile_overlap(self) -> int:
        """Latent pixels around a tile that the decoder needs as input, on each side inside the frame."""
        pixels = 0
        for _ in self.temporal:
            # A stage's blocks, and the upsampling after it.
            pixels = 2 * (pixels + 2 * (self.num_blocks + 1) + 1)
        # The last stage's blocks, and the head.
        return -(-(pixels + 2 * (self.num_blocks + 1) + 1) // 2 ** len(self.temporal))

    @property
    def spatial_scale(self) -> int:
        """Pixels of a video to one latent pixel, along a side."""
        return 2 ** len(self.temporal) * (2 if self.residual else 1)

    @property
    def pixel_channels(self) -> int:
        """Channels of the encoder's input and of the decoder's output."""
        return 12 if self.residual else 3


@dataclass(frozen=True, kw_only=True)
class TransformerDims:
    """Hyperparameters of a diffusion transformer."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int = 0
    """Width of the image features; 0: cross-attention has no image branch."""
    image_positions: int = 0
    """Length of the position embedding over the features of several images; 0: none."""
    takes_next_timestep: bool = field(default=False, repr=False)
    """Whether the model is also told the timestep of the step that follows (MeanFlow, arXiv:2505.13447).

    Not in ``repr``, of which digests of earlier runs are made: the weights show it.
    """
    has_sla: bool = field(default=False, repr=False)
    """Whether self-attention is sparse-linear (models/attention/sla.py), with a projection in each block."""
    has_vsa: bool = field(default=False, repr=False)
    """Whether self-attention is sparse in tiles (models/attention/vsa.py), with a gate in each block."""
    vace_layers: tuple[int, ...] = field(default=(), repr=False)
    """Blocks to whose output a block of VACE's side branch is added (arXiv:2503.07598); none without it."""
    vace_in_dim: int = field(default=0, repr=False)
    """Channels of the side branch's input."""
    ref_conv_in_dim: int = field(default=0, repr=False)
    """Channels of a reference image's latents, whose tokens precede the video's; 0: it takes none."""
    camera_in_dim: int = field(default=0, repr=False)
    """Channels of the camera adapter's input, a frame in squares of pixels; 0: there is no adapter."""
    face_layers: tuple[int, ...] = field(default=(), repr=False)
    """Blocks after which a block of Animate's face adapter runs; none without it."""
    pose_dim: int = field(default=0, repr=False)
    """Channels of a pose video's latents, whose tokens are added to the video's; 0: none."""
    audio_layers: tuple[int, ...] = field(default=(), repr=False)
    """Blocks after which audio is added (arXiv:2508.18621); none without audio."""
    audio_dim: int = field(default=0, repr=False)
    """Width of the audio features."""
    num_audio_states: int = field(default=0, repr=False)
    """Layers of the audio model whose outputs are the features."""
    num_audio_tokens: int = field(default=0, repr=False)
    """Tokens that audio is encoded to for each latent frame, without a learned one."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def trained_attention(self) -> str | None:
        """Sparse self-attention that the model was trained with, sla or vsa; None for dense attention."""
        return "sla" if self.has_sla else "vsa" if self.has_vsa else None

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of all blocks, in the order in which they are called."""
        vace_names = {layer: f"vace_blocks.{index}" for index, layer in enumerate(self.vace_layers)}
        face_names = {
            layer: f"face_adapter.fuser_blocks.{index}"
            for index, layer in enumerate(self.face_layers)
        }
        return tuple(
            name
            for index in range(self.num_layers)
            for name in (f"blocks.{index}", vace_names.get(index), face_names.get(index))
            if name is not None
        )

    @property
    def context_block_names(self) -> tuple[str, ...]:
        """Names of the blocks that attend to contexts, in the order in which they are called."""
        return tuple(name for name in self.block_names if not name.startswith("face_adapter"))

    @property
    def blocks_gib(self) -> float:
        """Size of the blocks in bfloat16, GiB; they are nearly all of the transformer."""
        num_weights = len(self.context_block_names) * (
            6 * self.dim**2 + 2 * self.dim * self.ffn_dim
        )
        num_weights += len(self.face_layers) * 4 * self.dim**2
        return num_weights * 2 / 2**30


@dataclass(frozen=True, kw_only=True)
class TextEncoderDims:
    """Hyperparameters of the umT5 text encoder."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    vocab_size: int
    num_buckets: int = 32


@dataclass(frozen=True, kw_only=True)
class ImageEncoderDims:
    """Hyperparameters of the CLIP image encoder; ``num_layers`` counts the unused last layer too."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    patch: int = 14
    image_size: int = 224


@dataclass(frozen=True, kw_only=True)
class FaceEncoderDims:
    """Hyperparameters of Animate's motion and face encoders, from face frames to the transformer's width."""

    out_dim: int
    """Width of the transformer."""
    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    """Channels after the motion encoder's first convolution, and after each of its residual blocks."""
    feature_dim: int = 512
    num_linears: int = 5
    motion_dim: int = 20
    hidden_dim: int = 1024
    """Width of one of the face encoder's heads."""
    num_heads: int = 4

    @property
    def image_size(self) -> int:
        """Pixels of a face frame along a side: each residual block halves it, down to 4."""
        return int(4 * 2 ** (len(self.channels) - 1))


@dataclass(frozen=True, kw_only=True)
class AudioEncoderDims:
    """Hyperparameters of wav2vec2, with a norm after each convolution and one before each sub-layer."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    conv_dims: tuple[int, ...]
    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    position_taps: int
    """Steps that the convolution of positions spans."""
    position_groups: int
    eps: float = 1e-5

    @property
    def step_samples(self) -> int:
        """Samples between two steps."""
        return prod(self.conv_strides)

    @property
    def window_samples(self) -> int:
        """Samples that a step depends on before the first layer."""
        strides = itertools.accumulate(self.conv_strides, mul, initial=1)
        return 1 + sum(
            (kernel - 1) * stride
            for kernel, stride in zip(self.conv_kernels, strides, strict=False)
        )

    def count_steps(self, num_samples: int) -> int:
        """Return the steps that so many samples give."""
        return max(0, (num_samples - self.window_samples) // self.step_samples + 1)


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Hyperparameters of all models of a checkpoint."""

    transformer: TransformerDims
    text_encoder: TextEncoderDims
    image_encoder: ImageEncoderDims | None = None
    face_encoder: FaceEncoderDims | None = None
    audio_encoder: AudioEncoderDims | None = None
    vae: VaeDims
