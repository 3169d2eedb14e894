"""Memory of a denoising step: activations at their peak, and keys and values of the contexts; no torch."""

from math import prod

from wan_dist.planning.audio_memory import estimate_audio_context_bytes
from wan_dist.planning.control_memory import estimate_embedding_bytes
from wan_dist.planning.workload import FLOAT_BYTES, Arrangement, Workload

QUANTIZED_ROWS_PER_CHUNK = 1024
"""Rows in float32 at once in quantising and dequantising; as in models/kernels/quantized_linear.py."""
FLOAT32_CHUNK_TOKENS = 4096
"""Tokens that are in float32 at once; as in models/kernels/transformer_ops.py."""
SCORE_BYTES = 2**26
"""Bytes of the scores in memory at once where a ring attends by plain arithmetic; keys take as much at most.

As in models/attention/log_sum_exp.py.
"""
GATHERED_BYTES = 2 * 2**28
"""Bytes of keys and values that sparse attention gathers at once, and of as much beside them.

As in models/attention/block_sparse.py.
"""


def estimate_context_bytes(workload: Workload) -> tuple[int, int]:
    """Return the bytes of cross-attention's keys and values in all blocks.

    The first is of all prompts, the second of those that one rank computes with.
    """
    dims = workload.model_dims.transformer
    context_lengths = [length + 1 for length in workload.text_lengths]
    num_image_tokens = 257 * workload.num_images if dims.image_dim else 0
    bytes_per_token = len(dims.context_block_names) * 2 * dims.dim * workload.itemsize
    num_all_tokens = sum(context_lengths)
    num_own_tokens = max(context_lengths) if workload.cfg_degree == 2 else num_all_tokens
    sound_bytes = estimate_audio_context_bytes(workload)
    num_all, num_own = len(context_lengths), 1 if workload.cfg_degree == 2 else len(context_lengths)
    return (
        (num_all_tokens + num_image_tokens) * bytes_per_token + num_all * sound_bytes,
        (num_own_tokens + num_image_tokens) * bytes_per_token + num_own * sound_bytes,
    )


def estimate_activation_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of a denoising step's activations at their peak, on one rank."""
    dims, itemsize = workload.model_dims.transformer, workload.itemsize
    num_tokens = -(-workload.num_tokens // workload.num_sequence_parts)
    slice_tokens = min(arrangement.slice_tokens or num_tokens, num_tokens)
    hidden_bytes = num_tokens * dims.dim * itemsize
    num_branches = 1 if workload.cfg_degree == 2 else len(workload.text_lengths)
    runs_apart = arrangement.passes == "apart"
    residual_bytes = hidden_bytes * (1 if runs_apart else num_branches)
    if dims.vace_layers:  # the side branch has as many streams
        residual_bytes *= 2
    if workload.has_step_cache:
        # The tokens before the blocks, and with passes apart, what was added in the other pass.
        residual_bytes += hidden_bytes * (num_branches if runs_apart else 1)
    attention_bytes = _estimate_attention_bytes(workload, num_tokens, slice_tokens)
    feed_forward_bytes = slice_tokens * (2 * dims.dim + dims.ffn_dim) * itemsize
    if workload.quant == "fp8":
        feed_forward_bytes += (
            slice_tokens * dims.ffn_dim + 2 * QUANTIZED_ROWS_PER_CHUNK * dims.ffn_dim * FLOAT_BYTES
        )
    head_bytes = 4 * min(FLOAT32_CHUNK_TOKENS, num_tokens) * dims.dim * FLOAT_BYTES
    # The noise, the solver's latents, images; the VACE context or poses, also beside the latents.
    num_steering_channels = dims.vace_in_dim + dims.pose_dim
    num_latents = (
        6
        + 3 * bool(dims.audio_layers)
        + dims.in_dim // dims.out_dim
        + 4 * num_steering_channels // dims.out_dim
    )
    latent_bytes = prod(workload.latent_shape) * FLOAT_BYTES * num_latents
    embedding_bytes = estimate_embedding_bytes(workload, num_tokens, residual_bytes)
    block_bytes = residual_bytes + max(attention_bytes, feed_forward_bytes, head_bytes)
    return max(block_bytes, embedding_bytes) + latent_bytes


def _estimate_attention_bytes(workload: Workload, num_tokens: int, slice_tokens: int) -> int:
    """Return the bytes of self-attention at its peak, for a rank's ``num_tokens``, in slices."""
    dims, itemsize = workload.model_dims.transformer, workload.itemsize
    hidden_bytes = num_tokens * dims.dim * itemsize
    chunk_bytes = 4 * min(FLOAT32_CHUNK_TOKENS, slice_tokens) * dims.dim * FLOAT_BYTES
    if dims.has_sla or dims.has_vsa:
        chunk_bytes += GATHERED_BYTES + dims.has_vsa * hidden_bytes
    if slice_tokens < num_tokens and workload.num_sequence_parts == 1 and not dims.has_vsa:
        # k and v of all tokens, then q slice by slice.
        eight_bit_values = (2 * num_tokens + slice_tokens) * dims.dim * workload.has_8bit_attention
        return (
            2 * hidden_bytes
            + 3 * slice_tokens * dims.dim * itemsize
            + max(chunk_bytes, eight_bit_values)
        )
    # Ulysses: q, k and v as they are sent, and as they are received; a ring: k and v that are sent and
    # received, the sums in float32, a part of the scores and keys.
    is_split = workload.num_sequence_parts > 1
    exchange_bytes = 6 * hidden_bytes + 2 * SCORE_BYTES if is_split else 0
    eight_bit_bytes = 3 * num_tokens * dims.dim if workload.has_8bit_attention else 0
    return (
        4 * hidden_bytes
        + num_tokens * dims.num_heads * FLOAT_BYTES
        + max(exchange_bytes, chunk_bytes, eight_bit_bytes)
    )
