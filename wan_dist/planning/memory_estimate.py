"""How much memory each stage of a run takes, by part, from sizes alone; no torch.

Numbers of parameters are exact; activations count what is alive at the largest moment of each stage, in the order of the code.
bench/NOTES.md compares predictions with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from wan_dist.models.dims import ImageEncoderDims, ModelDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.planning.vae_memory import WHOLE, Way, vae_bytes

GIB = 2**30
HALF, FLOAT = 2, 4
SLOTS = 2
"""Blocks of a streamed model on the device."""
STAGED = 3
"""Blocks of a streamed model on the host where they are read from disk."""
GROUP = 64
"""Values that share a scale in int4; as in models/quantized.py."""
QUANTIZED_AT_ONCE = 1024
"""Rows that are in float32 at once where they are quantised or back; as in models/quantized.py."""
PIECE = 4096
"""Tokens that are in float32 at once; as in models/transformer_elementwise.py."""
SCORE_BYTES = 2**26
"""Of the scores that are there at once where a ring attends by plain arithmetic, as in models/attention.py; keys take as much at most."""
PROCESS_BYTES = {True: int(1.15 * GIB), False: int(0.32 * GIB)}
"""Of the host, whatever is run: interpreter and libraries, with a GPU its driver too."""
COLLECTIVES_BYTES = {True: int(0.35 * GIB), False: 0}
"""Of the host for each of several ranks: what NCCL keeps."""
CONVOLVING_BYTES = {True: int(0.35 * GIB), False: 0}
"""Of the host once the VAE has worked: what cuDNN and Triton have compiled."""
CONTEXT_BYTES = int(0.75 * GIB)
"""Of each GPU, outside PyTorch's count: the driver's context, and what lies unused between allocations."""
UNUSED_BYTES = int(0.25 * GIB)
"""The last of these alone."""
NCCL_BYTES, LATER_NCCL_BYTES = int(2.1 * GIB), int(1.2 * GIB)
"""Of each of several GPUs, outside PyTorch's count: NCCL's buffers, and those of them that come with the first exchange."""
LIBRARY_BYTES = 48 * 2**20
"""Of each GPU in any stage: what cuBLAS keeps to work with."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where models are and how much of them is computed at once."""

    dit: str = "resident"
    """The transformer's weights: resident, stream or disk."""
    t5: str = "gpu"
    """Where the text encoder works: gpu, stream or cpu."""
    clip: str = "gpu"
    """Where images are looked at: gpu or cpu."""
    shard_dit: bool = False
    shard_t5: bool = False
    slice_tokens: int | None = None
    passes: str = "together"
    vae: Way = WHOLE
    """How frames are made."""
    image: Way = WHOLE
    """How images are encoded."""

    @property
    def words(self) -> str:
        """The arrangement in a line."""
        dit = "sharded" if self.shard_dit else {"stream": "streamed", "disk": "from disk"}.get(self.dit, self.dit)
        sliced = f", {self.slice_tokens} tokens at a time" if self.slice_tokens else ""
        passes = ", passes apart" if self.passes == "apart" else ""
        t5 = "sharded" if self.shard_t5 else {"gpu": "whole", "stream": "block by block", "cpu": "on the CPU"}[self.t5]
        clip = "; CLIP on the CPU" if self.clip == "cpu" else ""
        return f"transformer {dit}{sliced}{passes}; text encoder {t5}{clip}; VAE {self.vae}"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run works on, as far as memory is concerned."""

    models: ModelDims
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w)."""
    num_tokens: int
    """Of the video."""
    text_tokens: tuple[int, ...]
    """Of the prompt, and of the negative one if there is one."""
    num_images: int = 0
    is_first_frame: bool = False
    """The image is encoded alone, as the video's first latent frame, not as a video with empty frames after it."""
    num_experts: int = 1
    keeps_steps: bool = False
    """What all blocks added to the tokens is kept for the next step."""
    num_ranks: int = 1
    cfg: int = 1
    num_parts: int = 1
    """Of the sequence: ranks of ring and ulysses."""
    ranks_per_node: int = 1
    quant: str = "none"
    attends_in_8_bits: bool = False
    on_gpu: bool = True
    itemsize: int = HALF
    vae_itemsize: int = HALF

    def vae_size(self, *, encode: bool) -> tuple[int, int, int]:
        """Return latent frames, rows and columns of what the VAE decodes, or encodes."""
        frames, rows, columns = self.latent_shape[1:]
        return 1 if encode and self.is_first_frame else frames, rows, columns


@dataclass(frozen=True)
class Use:
    """Bytes of one stage on one rank, by part; the host's for all ranks of a node."""

    stage: str
    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        """All of the GPU's."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return sum(self.host.values())


def block_bytes(dims: TransformerDims, itemsize: int, quant: str = "none") -> int:
    """Return the bytes of a transformer's block without cross-attention's keys and values: linears, and vectors in float32."""
    d, f = dims.dim, dims.ffn_dim
    rows, weights = 7 * d + f, 6 * d * d + 2 * d * f
    if quant == "none":
        stored = weights * itemsize
    else:  # see models/quantized.py
        stored = weights // 2 + weights // GROUP * 2 * FLOAT if quant == "int4" else weights + rows * FLOAT
    return stored + rows * itemsize + (2 * d + d + 2 * d + 6 * d) * FLOAT


def blocks_bytes(dims: TransformerDims, itemsize: int, quant: str) -> int:
    """Return the bytes of all blocks; the first and the last are not quantised."""
    inner = max(0, dims.num_layers - 2)
    return inner * block_bytes(dims, itemsize, quant) + (dims.num_layers - inner) * block_bytes(dims, itemsize)


def time_bytes(dims: TransformerDims) -> int:
    """Return the bytes of what embeds timesteps, float32."""
    return (dims.freq_dim + 1 + dims.dim + 1 + 6 * (dims.dim + 1)) * dims.dim * FLOAT


def transformer_bytes(dims: TransformerDims, itemsize: int, quant: str = "none") -> int:
    """Return the bytes of all of a transformer but the projection of contexts."""
    patch = prod(dims.patch)
    head = (dims.dim + 1) * patch * dims.out_dim + 2 * dims.dim
    return blocks_bytes(dims, itemsize, quant) + (dims.in_dim * patch + 1) * dims.dim * itemsize + time_bytes(dims) + head * FLOAT


def context_block_bytes(dims: TransformerDims, itemsize: int) -> int:
    """Return the bytes of one block's projection to keys and values."""
    branches = 1 + bool(dims.image_dim)
    return branches * (2 * dims.dim * (dims.dim + 1) * itemsize + dims.dim * FLOAT)


def projection_bytes(dims: TransformerDims, itemsize: int, num_blocks: int) -> int:
    """Return the bytes of the projection of contexts, with this many blocks."""
    total = (dims.text_dim + 1 + dims.dim + 1) * dims.dim * itemsize + num_blocks * context_block_bytes(dims, itemsize)
    if dims.image_dim:
        width = dims.image_dim
        total += (2 * width + (width + 1) * width + (width + 1) * dims.dim + 2 * dims.dim + dims.image_positions * width) * FLOAT
    return total


def text_block_bytes(dims: TextEncoderDims, itemsize: int) -> int:
    """Return the bytes of a block of umT5."""
    inner = dims.num_heads * dims.head_dim
    return (4 * dims.dim * inner + 3 * dims.dim * dims.ffn_dim + dims.num_buckets * dims.num_heads + 2 * dims.dim) * itemsize


def text_encoder_bytes(dims: TextEncoderDims, itemsize: int) -> int:
    """Return the bytes of umT5's encoder."""
    return dims.num_layers * text_block_bytes(dims, itemsize) + (dims.vocab_size + 1) * dims.dim * itemsize


def image_encoder_bytes(dims: ImageEncoderDims) -> int:
    """Return the bytes of CLIP's vision tower up to the layer that is read, float32."""
    d, f = dims.dim, dims.ffn_dim
    layer = 4 * d * (d + 1) + f * (d + 1) + d * (f + 1) + 4 * d
    positions = (dims.image_size // dims.patch) ** 2 + 1
    return ((dims.num_layers - 1) * layer + (3 * dims.patch**2 + 1 + positions) * d + 2 * d) * FLOAT


def vae_weight_bytes(dims: VaeDims, itemsize: int) -> int:
    """Return the bytes of a VAE's encoder and decoder."""
    latent = dims.latent_dim
    total = (2 * latent) * (2 * latent + 1) + latent * (latent + 1)
    first, last = dims.encoder_stages[0][0], dims.encoder_stages[-1][1]
    total += _conv(dims.pixel_channels, first, 27) + _middle(last) + last + _conv(last, 2 * latent, 27)
    for stage, (before, after) in enumerate(dims.encoder_stages):
        total += _residual(before, after) + (dims.num_blocks - 1) * _residual(after, after)
        if stage < len(dims.temporal):
            total += _conv(after, after, 9) + (_conv(after, after, 3) if dims.temporal[stage] else 0)
    first, last = dims.decoder_stages[0][0], dims.decoder_stages[-1][1]
    total += _conv(latent, first, 27) + _middle(first) + last + _conv(last, dims.pixel_channels, 27)
    for stage, (before, after) in enumerate(dims.decoder_stages):
        total += _residual(before, after) + dims.num_blocks * _residual(after, after)
        if stage < len(dims.temporal):
            total += _conv(after, after if dims.residual else after // 2, 9)
            total += _conv(after, 2 * after, 3) if dims.temporal[::-1][stage] else 0
    return total * itemsize


def _conv(before: int, after: int, kernel: int) -> int:
    return before * after * kernel + after


def _residual(before: int, after: int) -> int:
    return before + after + _conv(before, after, 27) + _conv(after, after, 27) + (_conv(before, after, 1) if before != after else 0)


def _middle(dim: int) -> int:
    return 2 * _residual(dim, dim) + dim + _conv(dim, 3 * dim, 1) + _conv(dim, dim, 1)


def context_bytes(load: Load) -> tuple[int, int]:
    """Return the bytes of cross-attention's keys and values in all blocks: of all prompts, and of those that a rank computes with."""
    dims = load.models.transformer
    each = [number + 1 for number in load.text_tokens]
    image = 257 * load.num_images if dims.image_dim else 0
    of_token = dims.num_layers * 2 * dims.dim * load.itemsize
    return (sum(each) + image) * of_token, ((max(each) if load.cfg == 2 else sum(each)) + image) * of_token


def activation_bytes(load: Load, arrangement: Arrangement) -> int:
    """Return the bytes of a denoising step's activations at their largest moment, on one rank."""
    dims, e = load.models.transformer, load.itemsize
    tokens = -(-load.num_tokens // load.num_parts)
    part = min(arrangement.slice_tokens or tokens, tokens)
    width = tokens * dims.dim * e
    branches = 1 if load.cfg == 2 else len(load.text_tokens)
    streams = width * (1 if arrangement.passes == "apart" else branches)
    if load.keeps_steps:  # the tokens as they came, and apart, what was added in the other pass
        streams += width * (branches if arrangement.passes == "apart" else 1)
    pieces = 4 * min(PIECE, part) * dims.dim * FLOAT
    if part < tokens and load.num_parts == 1:  # k and v of all, then q in turn
        attend = 2 * width + 3 * part * dims.dim * e + max(pieces, (2 * tokens + part) * dims.dim * load.attends_in_8_bits)
    else:
        # Ulysses: q, k and v as they are sent, and as they come; a ring: k and v that come and go, the sums in float32, a part of them.
        exchanged = 6 * width + 2 * SCORE_BYTES if load.num_parts > 1 else 0
        rounded = 3 * tokens * dims.dim if load.attends_in_8_bits else 0
        attend = 4 * width + tokens * dims.num_heads * FLOAT + max(exchanged, pieces, rounded)
    feed = part * (2 * dims.dim + dims.ffn_dim) * e
    if load.quant == "fp8":
        feed += part * dims.ffn_dim + 2 * QUANTIZED_AT_ONCE * dims.ffn_dim * FLOAT
    head = 4 * min(PIECE, tokens) * dims.dim * FLOAT
    latents = prod(load.latent_shape) * FLOAT * (6 + dims.in_dim // dims.out_dim)  # the noise, the solver's, and those of images
    embed = (load.num_tokens + tokens) * dims.dim * e if load.num_parts > 1 else 0  # every rank embeds all tokens, then keeps its own
    return max(streams + max(attend, feed, head), embed) + latents


def footprint(load: Load, arrangement: Arrangement) -> list[Use]:
    """Return what each stage takes. On a run without a GPU, ``gpu`` is what its tensors take of the host."""
    e, dims = load.itemsize, load.models.transformer
    contexts, own_contexts = context_bytes(load)
    each = PROCESS_BYTES[load.on_gpu] + (COLLECTIVES_BYTES[load.on_gpu] if load.num_ranks > 1 else 0)
    process = {"process": each * load.ranks_per_node}
    later = {"process": process["process"] + CONVOLVING_BYTES[load.on_gpu] * load.ranks_per_node}
    uses = [_text(load, arrangement, process)]
    if load.models.image_encoder is not None and load.num_images:
        parts = {"weights": image_encoder_bytes(load.models.image_encoder), "activations": int(0.05 * GIB)}
        uses.append(Use("look", {}, process | parts) if arrangement.clip == "cpu" else Use("look", parts, process))
    if load.num_images:
        process = later
        uses.append(_vae(load, arrangement.image, "image", process))
    own = -(-dims.num_layers // load.num_ranks)
    num_blocks = own if arrangement.dit == "resident" else min(SLOTS, own)
    staged = {} if arrangement.dit == "resident" else {"staging": STAGED * context_block_bytes(dims, e) * load.ranks_per_node}
    shared = contexts // load.num_ranks  # a rank's share, block by block
    gpu = {"weights": projection_bytes(dims, e, num_blocks), "contexts": shared + contexts}
    uses.append(Use("context", gpu, process | staged))
    weights = transformer_bytes(dims, e, load.quant) - time_bytes(dims)
    read = 0 if arrangement.dit != "resident" else dims.dim * dims.ffn_dim * e  # the largest tensor, before it is where it belongs
    block, blocks = block_bytes(dims, e), blocks_bytes(dims, e, load.quant)
    host = dict(process)
    if arrangement.dit != "resident":
        weights += SLOTS * block - blocks
        held = blocks if arrangement.dit == "stream" else STAGED * block
        host["weights" if arrangement.dit == "stream" else "staging"] = held * load.ranks_per_node
    if arrangement.shard_dit:
        weights = load.num_experts * (weights + time_bytes(dims)) // load.num_ranks  # both are there from the start
    embedding = 0 if arrangement.shard_dit else time_bytes(dims)
    at_first = host if "weights" not in host else process | {"staging": STAGED * block * load.ranks_per_node}  # the others come later
    uses.append(Use("load", {"weights": weights + embedding, "contexts": contexts, "staging": read}, at_first))
    gathered = {"gathered": 2 * block} if arrangement.shard_dit else {}
    activations = {"activations": activation_bytes(load, arrangement)}
    if load.quant in ("int8", "int4"):
        activations["workspace"] = dims.dim * max(3 * dims.dim, dims.ffn_dim) * e  # of a linear in full
    uses.append(Use("denoise", {"weights": weights, "contexts": own_contexts} | gathered | activations, host))
    uses.append(_vae(load, arrangement.vae, "decode", later))
    libraries = {"libraries": LIBRARY_BYTES} if load.on_gpu else {}
    return [replace(use, gpu=use.gpu | libraries) if use.gpu else use for use in uses]


def _text(load: Load, arrangement: Arrangement, process: dict[str, int]) -> Use:
    dims, e = load.models.text_encoder, load.itemsize
    block, whole = text_block_bytes(dims, e), text_encoder_bytes(dims, e)
    activations = max(load.text_tokens) * (4 * dims.dim + 3 * dims.ffn_dim) * FLOAT
    if arrangement.t5 == "cpu":
        return Use("text", {}, process | {"weights": whole, "activations": activations})
    if arrangement.t5 == "stream":
        return Use("text", {"weights": SLOTS * block, "activations": activations}, process | {"staging": STAGED * block})
    if arrangement.shard_t5:
        return Use("text", {"weights": whole // load.num_ranks, "gathered": 2 * block, "activations": activations}, process)
    return Use("text", {"weights": whole, "activations": activations}, process)


def _vae(load: Load, way: Way, stage: str, process: dict[str, int]) -> Use:
    dims, itemsize, encode = load.models.vae, load.vae_itemsize, stage == "image"
    frames, rows, columns = load.vae_size(encode=encode)
    size = (min(rows, columns), *way.part_of(max(rows, columns), load.num_ranks, dims))
    parts = {
        "weights": vae_weight_bytes(dims, itemsize),
        "activations": vae_bytes(dims, size, itemsize, at_once=way.at_once, encode=encode, still=frames == 1),
    }
    return Use(stage, {}, process | parts) if way.name == "cpu" else Use(stage, parts, process)


def table(uses: Sequence[Use], gpu: int | None, host: int) -> list[str]:
    """Return a table of what stages take, in GiB, beside what there is."""
    lines = [f"{'GiB':9} {'GPU' if gpu is not None else 'tensors':>8}  of which{'':45} {'host':>6}"]
    for use in uses:
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in use.gpu.items() if size >= 0.05 * GIB)
        lines.append(f"{use.stage:9} {use.gpu_bytes / GIB:8.1f}  {parts:53} {use.host_bytes / GIB:6.1f}")
    room = f"{gpu / GIB:8.1f}" if gpu is not None else f"{'':8}"
    return [*lines, f"{'there is':9} {room}  {'':53} {host / GIB:6.1f}"]
