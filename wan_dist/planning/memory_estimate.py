"""How much memory each stage of a run takes, by part, from sizes alone; no torch.

Numbers of parameters are exact; activations count what is alive at the largest moment of each stage, in the order of the code.
bench/NOTES.md compares predictions with measured peaks.
"""

from dataclasses import dataclass, field, replace
from math import prod

from wan_dist.planning.parameter_bytes import (
    count_all_blocks_bytes,
    count_block_bytes,
    count_context_block_bytes,
    count_image_encoder_bytes,
    count_projection_bytes,
    count_text_block_bytes,
    count_text_encoder_bytes,
    count_time_embedding_bytes,
    count_transformer_bytes,
    count_vae_weight_bytes,
)
from wan_dist.planning.vae_memory import VaeStrategy, estimate_vae_bytes
from wan_dist.planning.workload import FLOAT_BYTES, GIB, Arrangement, Workload

STREAMED_BLOCKS = 2
"""Blocks of a streamed model on the device."""
STAGED_BLOCKS = 3
"""Blocks of a streamed model on the host where they are read from disk."""
QUANTIZED_ROWS_PER_CHUNK = 1024
"""Rows that are in float32 at once where they are quantised or back; as in models/quantized.py."""
FLOAT32_CHUNK_TOKENS = 4096
"""Tokens that are in float32 at once; as in models/transformer_elementwise.py."""
SCORE_BYTES = 2**26
"""Of the scores that are there at once where a ring attends by plain arithmetic, as in models/attention.py; keys take as much at most."""
PROCESS_HOST_BYTES = {True: int(1.15 * GIB), False: int(0.32 * GIB)}
"""Of the host, whatever is run: interpreter and libraries, with a GPU its driver too."""
NCCL_HOST_BYTES = {True: int(0.35 * GIB), False: 0}
"""Of the host for each of several ranks: what NCCL keeps."""
VAE_KERNELS_HOST_BYTES = {True: int(0.35 * GIB), False: 0}
"""Of the host once the VAE has worked: what cuDNN and Triton have compiled."""
DRIVER_CONTEXT_BYTES = int(0.75 * GIB)
"""Of each GPU, outside PyTorch's count: the driver's context, and what lies unused between allocations."""
FRAGMENTATION_BYTES = int(0.25 * GIB)
"""The last of these alone."""
NCCL_GPU_BYTES, LATER_NCCL_GPU_BYTES = int(2.1 * GIB), int(1.2 * GIB)
"""Of each of several GPUs, outside PyTorch's count: NCCL's buffers, and those of them that come with the first exchange."""
CUBLAS_WORKSPACE_BYTES = 48 * 2**20
"""Of each GPU in any stage: what cuBLAS keeps to work with."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one rank, by part; the host's for all ranks of a node."""

    name: str
    gpu_parts: dict[str, int] = field(default_factory=dict)
    host_parts: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        """All of the GPU's."""
        return sum(self.gpu_parts.values())

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return sum(self.host_parts.values())


def estimate_context_bytes(workload: Workload) -> tuple[int, int]:
    """Return the bytes of cross-attention's keys and values in all blocks: of all prompts, and of those that a rank computes with."""
    dims = workload.model_dims.transformer
    context_lengths = [length + 1 for length in workload.text_lengths]
    num_image_tokens = 257 * workload.num_images if dims.image_dim else 0
    bytes_per_token = dims.num_layers * 2 * dims.dim * workload.itemsize
    return (sum(context_lengths) + num_image_tokens) * bytes_per_token, (
        (max(context_lengths) if workload.cfg_degree == 2 else sum(context_lengths))
        + num_image_tokens
    ) * bytes_per_token


def estimate_activation_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of a denoising step's activations at their largest moment, on one rank."""
    dims, itemsize = workload.model_dims.transformer, workload.itemsize
    num_tokens = -(-workload.num_tokens // workload.num_sequence_parts)
    slice_tokens = min(arrangement.slice_tokens or num_tokens, num_tokens)
    hidden_bytes = num_tokens * dims.dim * itemsize
    num_branches = 1 if workload.cfg_degree == 2 else len(workload.text_lengths)
    residual_bytes = hidden_bytes * (1 if arrangement.passes == "apart" else num_branches)
    if (
        workload.has_step_cache
    ):  # the tokens as they came, and apart, what was added in the other pass
        residual_bytes += hidden_bytes * (num_branches if arrangement.passes == "apart" else 1)
    chunk_bytes = 4 * min(FLOAT32_CHUNK_TOKENS, slice_tokens) * dims.dim * FLOAT_BYTES
    if (
        slice_tokens < num_tokens and workload.num_sequence_parts == 1
    ):  # k and v of all, then q in turn
        attention_bytes = (
            2 * hidden_bytes
            + 3 * slice_tokens * dims.dim * itemsize
            + max(
                chunk_bytes,
                (2 * num_tokens + slice_tokens) * dims.dim * workload.has_8bit_attention,
            )
        )
    else:
        # Ulysses: q, k and v as they are sent, and as they come; a ring: k and v that come and go, the sums in float32, a part of them.
        exchange_bytes = (
            6 * hidden_bytes + 2 * SCORE_BYTES if workload.num_sequence_parts > 1 else 0
        )
        eight_bit_bytes = 3 * num_tokens * dims.dim if workload.has_8bit_attention else 0
        attention_bytes = (
            4 * hidden_bytes
            + num_tokens * dims.num_heads * FLOAT_BYTES
            + max(exchange_bytes, chunk_bytes, eight_bit_bytes)
        )
    feed_forward_bytes = slice_tokens * (2 * dims.dim + dims.ffn_dim) * itemsize
    if workload.quant == "fp8":
        feed_forward_bytes += (
            slice_tokens * dims.ffn_dim + 2 * QUANTIZED_ROWS_PER_CHUNK * dims.ffn_dim * FLOAT_BYTES
        )
    head_bytes = 4 * min(FLOAT32_CHUNK_TOKENS, num_tokens) * dims.dim * FLOAT_BYTES
    latent_bytes = (
        prod(workload.latent_shape) * FLOAT_BYTES * (6 + dims.in_dim // dims.out_dim)
    )  # the noise, the solver's, and those of images
    embedding_bytes = (
        (workload.num_tokens + num_tokens) * dims.dim * itemsize
        if workload.num_sequence_parts > 1
        else 0
    )  # every rank embeds all tokens, then keeps its own
    return (
        max(residual_bytes + max(attention_bytes, feed_forward_bytes, head_bytes), embedding_bytes)
        + latent_bytes
    )


def estimate_memory(workload: Workload, arrangement: Arrangement) -> list[StageMemory]:
    """Return what each stage takes. On a run without a GPU, ``gpu`` is what its tensors take of the host."""
    itemsize, dims = workload.itemsize, workload.model_dims.transformer
    all_context_bytes, own_context_bytes = estimate_context_bytes(workload)
    rank_process_bytes = PROCESS_HOST_BYTES[workload.is_on_gpu] + (
        NCCL_HOST_BYTES[workload.is_on_gpu] if workload.num_ranks > 1 else 0
    )
    process_parts = {"process": rank_process_bytes * workload.ranks_per_node}
    later_process_parts = {
        "process": process_parts["process"]
        + VAE_KERNELS_HOST_BYTES[workload.is_on_gpu] * workload.ranks_per_node
    }
    stages = [_estimate_text_stage(workload, arrangement, process_parts)]
    if workload.model_dims.image_encoder is not None and workload.num_images:
        clip_parts = {
            "weights": count_image_encoder_bytes(workload.model_dims.image_encoder),
            "activations": int(0.05 * GIB),
        }
        stages.append(
            StageMemory("look", {}, process_parts | clip_parts)
            if arrangement.clip == "cpu"
            else StageMemory("look", clip_parts, process_parts)
        )
    if workload.num_images:
        process_parts = later_process_parts
        stages.append(_estimate_vae_stage(workload, arrangement.image, "image", process_parts))
    num_own_blocks = -(-dims.num_layers // workload.num_ranks)
    num_blocks = (
        num_own_blocks if arrangement.dit == "resident" else min(STREAMED_BLOCKS, num_own_blocks)
    )
    staging_parts = (
        {}
        if arrangement.dit == "resident"
        else {
            "staging": STAGED_BLOCKS
            * count_context_block_bytes(dims, itemsize)
            * workload.ranks_per_node
        }
    )
    context_shard_bytes = all_context_bytes // workload.num_ranks  # a rank's share, block by block
    gpu_parts = {
        "weights": count_projection_bytes(dims, itemsize, num_blocks),
        "contexts": context_shard_bytes + all_context_bytes,
    }
    stages.append(StageMemory("context", gpu_parts, process_parts | staging_parts))
    weight_bytes = count_transformer_bytes(
        dims, itemsize, workload.quant
    ) - count_time_embedding_bytes(dims)
    read_buffer_bytes = (
        0 if arrangement.dit != "resident" else dims.dim * dims.ffn_dim * itemsize
    )  # the largest tensor, before it is where it belongs
    one_block_bytes, all_blocks_bytes = (
        count_block_bytes(dims, itemsize),
        count_all_blocks_bytes(dims, itemsize, workload.quant),
    )
    host_parts = dict(process_parts)
    if arrangement.dit != "resident":
        weight_bytes += STREAMED_BLOCKS * one_block_bytes - all_blocks_bytes
        held_block_bytes = (
            all_blocks_bytes if arrangement.dit == "stream" else STAGED_BLOCKS * one_block_bytes
        )
        host_parts["weights" if arrangement.dit == "stream" else "staging"] = (
            held_block_bytes * workload.ranks_per_node
        )
    if arrangement.shard_dit:
        weight_bytes = (
            workload.num_experts
            * (weight_bytes + count_time_embedding_bytes(dims))
            // workload.num_ranks
        )  # both are there from the start
    time_embedding_bytes = 0 if arrangement.shard_dit else count_time_embedding_bytes(dims)
    initial_host_parts = (
        host_parts
        if "weights" not in host_parts
        else process_parts | {"staging": STAGED_BLOCKS * one_block_bytes * workload.ranks_per_node}
    )  # the others come later
    stages.append(
        StageMemory(
            "load",
            {
                "weights": weight_bytes + time_embedding_bytes,
                "contexts": all_context_bytes,
                "staging": read_buffer_bytes,
            },
            initial_host_parts,
        )
    )
    gathered_parts = {"gathered": 2 * one_block_bytes} if arrangement.shard_dit else {}
    denoise_parts = {"activations": estimate_activation_bytes(workload, arrangement)}
    if workload.quant in ("int8", "int4"):
        denoise_parts["workspace"] = (
            dims.dim * max(3 * dims.dim, dims.ffn_dim) * itemsize
        )  # of a linear in full
    stages.append(
        StageMemory(
            "denoise",
            {"weights": weight_bytes, "contexts": own_context_bytes}
            | gathered_parts
            | denoise_parts,
            host_parts,
        )
    )
    stages.append(_estimate_vae_stage(workload, arrangement.vae, "decode", later_process_parts))
    library_parts = {"libraries": CUBLAS_WORKSPACE_BYTES} if workload.is_on_gpu else {}
    return [
        replace(stage, gpu_parts=stage.gpu_parts | library_parts) if stage.gpu_parts else stage
        for stage in stages
    ]


def _estimate_text_stage(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    dims, itemsize = workload.model_dims.text_encoder, workload.itemsize
    one_block_bytes, encoder_bytes = (
        count_text_block_bytes(dims, itemsize),
        count_text_encoder_bytes(dims, itemsize),
    )
    peak_activation_bytes = (
        max(workload.text_lengths) * (4 * dims.dim + 3 * dims.ffn_dim) * FLOAT_BYTES
    )
    if arrangement.t5 == "cpu":
        return StageMemory(
            "text",
            {},
            process_parts | {"weights": encoder_bytes, "activations": peak_activation_bytes},
        )
    if arrangement.t5 == "stream":
        return StageMemory(
            "text",
            {"weights": STREAMED_BLOCKS * one_block_bytes, "activations": peak_activation_bytes},
            process_parts | {"staging": STAGED_BLOCKS * one_block_bytes},
        )
    if arrangement.shard_t5:
        return StageMemory(
            "text",
            {
                "weights": encoder_bytes // workload.num_ranks,
                "gathered": 2 * one_block_bytes,
                "activations": peak_activation_bytes,
            },
            process_parts,
        )
    return StageMemory(
        "text", {"weights": encoder_bytes, "activations": peak_activation_bytes}, process_parts
    )


def _estimate_vae_stage(
    workload: Workload, strategy: VaeStrategy, stage_name: str, process_parts: dict[str, int]
) -> StageMemory:
    dims, itemsize, is_encoding = (
        workload.model_dims.vae,
        workload.vae_itemsize,
        stage_name == "image",
    )
    frames, rows, columns = workload.get_vae_size(encode=is_encoding)
    part_size = (
        min(rows, columns),
        *strategy.compute_largest_part(max(rows, columns), workload.num_ranks, dims),
    )
    parts = {
        "weights": count_vae_weight_bytes(dims, itemsize),
        "activations": estimate_vae_bytes(
            dims,
            part_size,
            itemsize,
            at_once=strategy.at_once,
            encode=is_encoding,
            is_still=frames == 1,
        ),
    }
    return (
        StageMemory(stage_name, {}, process_parts | parts)
        if strategy.name == "cpu"
        else StageMemory(stage_name, parts, process_parts)
    )
