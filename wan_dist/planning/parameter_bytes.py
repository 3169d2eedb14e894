"""Bytes of the models' parameters, exact, from their dimensions; no torch."""

from math import prod

from wan_dist.models.dims import ImageEncoderDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.planning.workload import FLOAT

GROUP = 64
"""Values that share a scale in int4; as in models/quantized.py."""


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
