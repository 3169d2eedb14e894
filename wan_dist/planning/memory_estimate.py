"""How much memory each stage of a run takes, by part, from sizes alone; no torch.

Numbers of parameters are exact; activations count what is alive at the largest moment of each stage, in the order of the code.
bench/NOTES.md compares predictions with measured peaks.
"""

from dataclasses import dataclass, field, replace
from math import prod

from wan_dist.planning.parameter_bytes import (
    block_bytes,
    blocks_bytes,
    context_block_bytes,
    image_encoder_bytes,
    projection_bytes,
    text_block_bytes,
    text_encoder_bytes,
    time_bytes,
    transformer_bytes,
    vae_weight_bytes,
)
from wan_dist.planning.vae_memory import Way, vae_bytes
from wan_dist.planning.workload import FLOAT, GIB, Arrangement, Load

SLOTS = 2
"""Blocks of a streamed model on the device."""
STAGED = 3
"""Blocks of a streamed model on the host where they are read from disk."""
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
