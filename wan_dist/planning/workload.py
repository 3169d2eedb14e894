"""Workload and arrangement of a run, as far as memory depends on them; no torch."""

from dataclasses import dataclass

from wan_dist.models.dims import ModelDims
from wan_dist.planning.vae_memory import WHOLE_VAE, VaeStrategy

GIB = 2**30
HALF_BYTES, FLOAT_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True)
class CompressedBlocks:
    """A transformer whose blocks' linears stay in a GGUF file's blocks; of two experts the larger one."""

    block_bytes: int
    """Bytes of the largest transformer block, with its vectors and the weights that are not in blocks."""
    all_bytes: int
    """Bytes of all transformer blocks."""
    decoded_bytes: int
    """Bytes of the decoded weights of one of them."""
    num_weights: int
    """Weights that the file has in blocks."""
    num_changed: int = 0
    """Those that LoRAs change, which is merged each time that they are decoded."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Placement of the models, and how much of them is computed at once."""

    dit: str = "resident"
    """The transformer's weights: resident, stream or disk."""
    gguf: str = "decoded"
    """The transformer's weights of a GGUF file: decoded, or compressed as in the file."""
    t5: str = "gpu"
    """Where the text encoder runs: gpu, stream or cpu."""
    clip: str = "gpu"
    """Where CLIP's image encoder runs: gpu or cpu."""
    shard_dit: bool = False
    shard_t5: bool = False
    slice_tokens: int | None = None
    """Tokens that the transformer's layers compute at once; None: all."""
    passes: str = "together"
    """The two passes of guidance: together in one batch, or apart."""
    vae: VaeStrategy = WHOLE_VAE
    """The VAE's strategy for decoding frames."""
    image: VaeStrategy = WHOLE_VAE
    """The VAE's strategy for encoding images."""

    @property
    def description(self) -> str:
        """The arrangement in one line."""
        dit = (
            "sharded"
            if self.shard_dit
            else {"stream": "streamed", "disk": "from disk"}.get(self.dit, self.dit)
        )
        compressed = " compressed" if self.gguf == "compressed" else ""
        sliced = f", {self.slice_tokens} tokens at a time" if self.slice_tokens else ""
        passes = ", passes apart" if self.passes == "apart" else ""
        t5 = (
            "sharded"
            if self.shard_t5
            else {"gpu": "whole", "stream": "block by block", "cpu": "on the CPU"}[self.t5]
        )
        clip = "; CLIP on the CPU" if self.clip == "cpu" else ""
        return f"transformer {dit}{compressed}{sliced}{passes}; text encoder {t5}{clip}; VAE {self.vae}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of what a run computes, as far as memory depends on them."""

    model_dims: ModelDims
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w), with reference images."""
    num_tokens: int
    """Tokens of the video."""
    text_lengths: tuple[int, ...]
    """Tokens of the prompt, and of the negative prompt if there is one."""
    num_images: int = 0
    num_reference_frames: int = 0
    """Latent frames of reference images, which precede those of the video and are not decoded."""
    num_context_latents: int = 0
    """Latent frames that are decoded before those of a clip: of the frames before it, or of a picture."""
    num_audio_samples: int = 0
    """Samples, of a second 16,000, that the audio encoder takes."""
    num_sound_frames: int = 0
    """Frames of all clips, whose features are kept."""
    driving_tokens: int = 0
    """Tokens of a driving video, whose keys and values all blocks keep."""
    has_encoded_input: bool = False
    """Whether the VAE encodes an input of the transformer."""
    has_known_first_frame: bool = False
    """The image is encoded alone as the first latent frame, not as a video with empty frames after it."""
    num_experts: int = 1
    has_step_cache: bool = False
    """Whether what all blocks added to the tokens is cached for the next step."""
    num_ranks: int = 1
    """Ranks of one replica."""
    cfg_degree: int = 1
    num_sequence_parts: int = 1
    """Parts of the sequence: ranks of ring times those of ulysses."""
    ranks_per_node: int = 1
    quant: str = "none"
    compressed_blocks: CompressedBlocks | None = None
    """Of a transformer in GGUF that can stay compressed."""
    has_8bit_attention: bool = False
    is_on_gpu: bool = True
    itemsize: int = HALF_BYTES
    vae_itemsize: int = HALF_BYTES
    merging_bytes: int = 0
    """Of merging LoRAs into one weight, on the device; see `estimate_merging_bytes`."""

    def get_vae_size(self, *, encode: bool) -> tuple[int, int, int]:
        """Return latent frames, rows and columns of what the VAE decodes, or encodes if ``encode``."""
        frames, rows, columns = self.latent_shape[1:]
        frames += self.num_context_latents - self.num_reference_frames
        return 1 if encode and self.has_known_first_frame else frames, rows, columns
