"""Parameter bytes of the models, exact, from their dimensions; no torch."""

from functools import cache
from math import prod

from wan_dist.models.dims import ImageEncoderDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.planning.workload import FLOAT_BYTES

INT4_GROUP_SIZE = 64
"""Values that share a scale in int4; as in models/kernels/quantized_linear.py."""


def count_block_bytes(dims: TransformerDims, itemsize: int, quant: str = "none") -> int:
    """Return the bytes of a transformer block, the largest if they are not alike.

    The projection to cross-attention's keys and values is left out: see `count_context_block_bytes`.
    """
    return _count_block_bytes(
        dims, itemsize, quant, num_projections=2 if dims.vace_layers or dims.audio_layers else 0
    )


def _count_block_bytes(
    dims: TransformerDims, itemsize: int, quant: str, num_projections: int
) -> int:
    """Return the bytes of a block's linear layers, and its vectors (norms, modulation) in float32.

    VACE's blocks have projections of their input and output besides, injections of audio have one of q and
    one of what they add, and a norm.
    """
    d, f = dims.dim, dims.ffn_dim
    num_rows, num_weights = 7 * d + f, 6 * d * d + 2 * d * f
    sla_bytes = dims.has_sla * dims.head_dim * (dims.head_dim + 1) * itemsize
    num_projections += dims.has_vsa  # its gate
    num_rows += num_projections * d
    num_weights += num_projections * d * d
    weight_bytes = _count_weight_bytes(num_weights, num_rows, itemsize, quant)
    num_vectors = 2 + 1 + 2 + 6 + (num_projections > 0 and bool(dims.audio_layers))
    vector_bytes = num_rows * itemsize + num_vectors * d * FLOAT_BYTES
    return weight_bytes + vector_bytes + sla_bytes


def _count_weight_bytes(num_weights: int, num_rows: int, itemsize: int, quant: str) -> int:
    """Return the bytes of linears' weights; as in models/kernels/quantized_linear.py."""
    if quant == "none":
        return num_weights * itemsize
    if quant == "int4":
        return num_weights // 2 + num_weights // INT4_GROUP_SIZE * 2 * FLOAT_BYTES
    return num_weights + num_rows * FLOAT_BYTES


def count_bytes_by_block(
    dims: TransformerDims, itemsize: int, quant: str = "none"
) -> dict[str, int]:
    """Return the bytes of each transformer block by name; the first and the last are not quantised."""
    names = dims.block_names
    return {
        name: _count_named_block_bytes(
            name, dims, itemsize, quant if 0 < index < len(names) - 1 else "none"
        )
        for index, name in enumerate(names)
    }


def _count_named_block_bytes(name: str, dims: TransformerDims, itemsize: int, quant: str) -> int:
    if name.startswith("face_adapter"):  # linears for q, k and v, and the output; norms of a head
        num_rows = 4 * dims.dim
        vector_bytes = num_rows * itemsize + 2 * dims.head_dim * FLOAT_BYTES
        return _count_weight_bytes(num_rows * dims.dim, num_rows, itemsize, quant) + vector_bytes
    num_projections = name.startswith("vace") + (name == "vace_blocks.0")
    num_projections += 2 * (name in {f"blocks.{layer}" for layer in dims.audio_layers})
    return _count_block_bytes(dims, itemsize, quant, num_projections)


@cache
def count_all_blocks_bytes(dims: TransformerDims, itemsize: int, quant: str) -> int:
    """Return the bytes of all transformer blocks; see `count_bytes_by_block`."""
    return sum(count_bytes_by_block(dims, itemsize, quant).values())


def count_time_embedding_bytes(dims: TransformerDims) -> int:
    """Return the bytes of the timestep embedding and its projection, float32."""
    num_embeddings = 1 + dims.takes_next_timestep
    num_embedding_rows = num_embeddings * (dims.freq_dim + 1 + dims.dim + 1)
    return (num_embedding_rows + 6 * (dims.dim + 1)) * dims.dim * FLOAT_BYTES


def count_transformer_bytes(dims: TransformerDims, itemsize: int, quant: str = "none") -> int:
    """Return the bytes of a transformer without its context projection (see `count_projection_bytes`)."""
    patch_volume = prod(dims.patch)
    num_head_parameters = (dims.dim + 1) * patch_volume * dims.out_dim + 2 * dims.dim
    num_speech_rows = 0
    if (
        dims.audio_layers
    ):  # patches of poses, and of frames before a clip in three sizes; kinds of tokens
        factors = (1, 1, 2, 4)
        num_speech_rows = sum(dims.in_dim * patch_volume * f**3 + 1 for f in factors) + 3
    return (
        count_all_blocks_bytes(dims, itemsize, quant)
        + (dims.in_dim * patch_volume + 1) * dims.dim * itemsize
        + (dims.vace_in_dim * patch_volume + bool(dims.vace_in_dim)) * dims.dim * itemsize
        + (dims.pose_dim * patch_volume + bool(dims.pose_dim)) * dims.dim * itemsize
        + num_speech_rows * dims.dim * itemsize
        + count_time_embedding_bytes(dims)
        + num_head_parameters * FLOAT_BYTES
    )


def count_context_block_bytes(dims: TransformerDims, itemsize: int) -> int:
    """Return the bytes of one block's projection of contexts to cross-attention's keys and values."""
    num_branches = 1 + bool(dims.image_dim)
    return num_branches * (2 * dims.dim * (dims.dim + 1) * itemsize + dims.dim * FLOAT_BYTES)


def count_projection_bytes(dims: TransformerDims, itemsize: int, num_blocks: int) -> int:
    """Return the bytes of the context projection with the keys and values of ``num_blocks`` blocks."""
    total_bytes = (
        dims.text_dim + 1 + dims.dim + 1
    ) * dims.dim * itemsize + num_blocks * count_context_block_bytes(dims, itemsize)
    if dims.image_dim:
        image_dim = dims.image_dim
        total_bytes += (
            2 * image_dim
            + (image_dim + 1) * image_dim
            + (image_dim + 1) * dims.dim
            + 2 * dims.dim
            + dims.image_positions * image_dim
        ) * FLOAT_BYTES
    return total_bytes + count_control_bytes(dims, itemsize)


def count_control_bytes(dims: TransformerDims, itemsize: int) -> int:
    """Return the bytes of the layers that embed a reference image and a camera's rays."""
    patch_area = prod(dims.patch[1:])
    num_parameters = 0
    if dims.ref_conv_in_dim:
        num_parameters += _count_conv_parameters(dims.ref_conv_in_dim, dims.dim, patch_area)
    if dims.camera_in_dim:
        num_parameters += _count_conv_parameters(dims.camera_in_dim, dims.dim, patch_area)
        num_parameters += 2 * _count_conv_parameters(dims.dim, dims.dim, 9)
    return num_parameters * itemsize


def count_text_block_bytes(dims: TextEncoderDims, itemsize: int) -> int:
    """Return the bytes of one block of umT5's encoder."""
    attention_dim = dims.num_heads * dims.head_dim
    return (
        4 * dims.dim * attention_dim
        + 3 * dims.dim * dims.ffn_dim
        + dims.num_buckets * dims.num_heads
        + 2 * dims.dim
    ) * itemsize


def count_text_encoder_bytes(dims: TextEncoderDims, itemsize: int) -> int:
    """Return the bytes of umT5's encoder, with its vocabulary."""
    return (
        dims.num_layers * count_text_block_bytes(dims, itemsize)
        + (dims.vocab_size + 1) * dims.dim * itemsize
    )


def count_image_encoder_bytes(dims: ImageEncoderDims) -> int:
    """Return the bytes of CLIP's vision tower up to the layer that is read, float32."""
    d, f = dims.dim, dims.ffn_dim
    num_layer_parameters = 4 * d * (d + 1) + f * (d + 1) + d * (f + 1) + 4 * d
    num_positions = (dims.image_size // dims.patch) ** 2 + 1
    return (
        (dims.num_layers - 1) * num_layer_parameters
        + (3 * dims.patch**2 + 1 + num_positions) * d
        + 2 * d
    ) * FLOAT_BYTES


def count_vae_weight_bytes(dims: VaeDims, itemsize: int) -> int:
    """Return the bytes of a VAE's encoder and decoder."""
    latent_dim = dims.latent_dim
    num_parameters = (2 * latent_dim) * (2 * latent_dim + 1) + latent_dim * (latent_dim + 1)
    first_dim, last_dim = dims.encoder_stages[0][0], dims.encoder_stages[-1][1]
    num_parameters += (
        _count_conv_parameters(dims.pixel_channels, first_dim, 27)
        + _count_middle_parameters(last_dim)
        + last_dim
        + _count_conv_parameters(last_dim, 2 * latent_dim, 27)
    )
    for stage, (in_dim, out_dim) in enumerate(dims.encoder_stages):
        num_parameters += _count_residual_parameters(in_dim, out_dim) + (
            dims.num_blocks - 1
        ) * _count_residual_parameters(out_dim, out_dim)
        if stage < len(dims.temporal):
            num_parameters += _count_conv_parameters(out_dim, out_dim, 9) + (
                _count_conv_parameters(out_dim, out_dim, 3) if dims.temporal[stage] else 0
            )
    first_dim, last_dim = dims.decoder_stages[0][0], dims.decoder_stages[-1][1]
    num_parameters += (
        _count_conv_parameters(latent_dim, first_dim, 27)
        + _count_middle_parameters(first_dim)
        + last_dim
        + _count_conv_parameters(last_dim, dims.pixel_channels, 27)
    )
    for stage, (in_dim, out_dim) in enumerate(dims.decoder_stages):
        num_parameters += _count_residual_parameters(
            in_dim, out_dim
        ) + dims.num_blocks * _count_residual_parameters(out_dim, out_dim)
        if stage < len(dims.temporal):
            num_parameters += _count_conv_parameters(
                out_dim, out_dim if dims.residual else out_dim // 2, 9
            )
            num_parameters += (
                _count_conv_parameters(out_dim, 2 * out_dim, 3) if dims.temporal[::-1][stage] else 0
            )
    return num_parameters * itemsize


def _count_conv_parameters(in_dim: int, out_dim: int, kernel_volume: int) -> int:
    return in_dim * out_dim * kernel_volume + out_dim


def _count_residual_parameters(in_dim: int, out_dim: int) -> int:
    return (
        in_dim
        + out_dim
        + _count_conv_parameters(in_dim, out_dim, 27)
        + _count_conv_parameters(out_dim, out_dim, 27)
        + (_count_conv_parameters(in_dim, out_dim, 1) if in_dim != out_dim else 0)
    )


def _count_middle_parameters(dim: int) -> int:
    return (
        2 * _count_residual_parameters(dim, dim)
        + dim
        + _count_conv_parameters(dim, 3 * dim, 1)
        + _count_conv_parameters(dim, dim, 1)
    )
