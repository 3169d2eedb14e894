"""Memory of speech to video: encoding and projecting sound, and what stays from clip to clip; no torch."""

from itertools import pairwise

from wan_dist.models.dims import AudioEncoderDims, TransformerDims
from wan_dist.planning.workload import FLOAT_BYTES, Workload
from wan_dist.tasks.speech import NUM_HISTORY_FRAMES

_STEPS_AT_ONCE = 1500
"""As in models/audio_encoder.py."""
_CONV_COPIES = 4
"""Tensors as large as the first convolution's output that are alive at once."""
_LAYER_COPIES = 6
"""Tensors as large as all steps of a layer that are alive at once, beside those of the feed-forward part."""
_PIXEL_BYTES = 3 * FLOAT_BYTES
_VAE_SCALE = 8


def count_audio_encoder_bytes(dims: AudioEncoderDims) -> int:
    """Return the bytes of wav2vec2, float32."""
    d, f = dims.dim, dims.ffn_dim
    num_parameters = sum(
        in_dim * out_dim * kernel + 3 * out_dim
        for (in_dim, out_dim), kernel in zip(
            pairwise((1, *dims.conv_dims)), dims.conv_kernels, strict=True
        )
    )
    num_parameters += 2 * dims.conv_dims[-1] + (dims.conv_dims[-1] + 1) * d
    # The convolution of positions has its weight's norms apart.
    num_parameters += dims.position_taps * (d * d // dims.position_groups + 1) + d + 2 * d
    num_parameters += dims.num_layers * (4 * d * (d + 1) + f * (d + 1) + d * (f + 1) + 4 * d)
    return num_parameters * FLOAT_BYTES


def list_encoder_parts(dims: AudioEncoderDims, num_samples: int) -> dict[str, int]:
    """Return the host memory of encoding a sound, on the replica's first rank."""
    num_steps = dims.count_steps(num_samples)
    first_steps = min(num_steps, _STEPS_AT_ONCE) * dims.step_samples // dims.conv_strides[0]
    conv_bytes = _CONV_COPIES * first_steps * dims.conv_dims[0] * FLOAT_BYTES
    layer_bytes = num_steps * (_LAYER_COPIES * dims.dim + 2 * dims.ffn_dim) * FLOAT_BYTES
    return {
        "weights": count_audio_encoder_bytes(dims),
        "activations": max(conv_bytes, layer_bytes) + 2 * num_samples * FLOAT_BYTES,
    }


def list_clip_parts(workload: Workload) -> dict[str, int]:
    """Return the host memory that stays from clip to clip: all features, and frames before a clip."""
    encoder = workload.model_dims.audio_encoder
    if encoder is None:
        return {}
    feature_bytes = (encoder.num_layers + 1) * encoder.dim * FLOAT_BYTES
    _, _, rows, columns = workload.latent_shape
    frame_bytes = rows * columns * _VAE_SCALE**2 * _PIXEL_BYTES
    return {
        "sound": workload.num_sound_frames * feature_bytes,
        "history": 2 * NUM_HISTORY_FRAMES * frame_bytes * workload.ranks_per_node,
    }


def count_audio_projection_bytes(dims: TransformerDims, itemsize: int, num_injections: int) -> int:
    """Return the bytes of the audio projection with so many injections; its encoder is in float32."""
    d, quarter = dims.dim, dims.dim // 4
    num_parameters = dims.num_audio_states + d
    num_parameters += (dims.num_audio_tokens + 1) * quarter * (3 * dims.audio_dim + 1)
    num_parameters += (3 * quarter + 1) * (d // 2) + (3 * (d // 2) + 1) * d + (d + 1) * d
    injection_bytes = 4 * d * (d + 1) * itemsize + d * FLOAT_BYTES
    return num_parameters * FLOAT_BYTES + num_injections * injection_bytes


def estimate_audio_context_bytes(workload: Workload) -> int:
    """Return the bytes of the keys, values and modulation of one prompt's sound."""
    dims = workload.model_dims.transformer
    num_tokens = (dims.num_audio_tokens + 1) * workload.itemsize + FLOAT_BYTES
    return len(dims.audio_layers) * 2 * workload.latent_shape[1] * dims.dim * num_tokens


def list_projection_parts(workload: Workload, *, is_resident: bool) -> dict[str, int]:
    """Return the memory of projecting a clip's sound, where each rank computes a share of the injections."""
    dims = workload.model_dims.transformer
    num_injections = -(-len(dims.audio_layers) // workload.num_ranks)
    if not is_resident:
        num_injections = min(2, num_injections)
    num_prompts = len(workload.text_lengths)
    return {
        "weights": count_audio_projection_bytes(dims, workload.itemsize, num_injections),
        "contexts": (num_prompts + 1) * estimate_audio_context_bytes(workload),
    }
