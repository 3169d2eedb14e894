"""Memory estimate of each stage of a run, by part, from sizes alone; no torch.

Numbers of parameters are exact; activations count what is alive at the peak of each stage, in the order of
the code. bench/NOTES.md compares predictions with measured peaks.
"""

from dataclasses import dataclass, field, replace

from wan_dist.models.dims import ImageEncoderDims
from wan_dist.planning.activation_memory import (
    estimate_activation_bytes,
    estimate_context_bytes,
)
from wan_dist.planning.audio_memory import (
    list_clip_parts,
    list_encoder_parts,
    list_projection_parts,
)
from wan_dist.planning.control_memory import (
    estimate_control_bytes,
    list_camera_parts,
)
from wan_dist.planning.face_memory import list_face_parts
from wan_dist.planning.gguf_memory import DECODING_BYTES
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
from wan_dist.planning.read_memory import NUM_READERS, READING_GPU_BYTES, READING_HOST_BYTES
from wan_dist.planning.vae_memory import VaeStrategy, estimate_vae_bytes
from wan_dist.planning.workload import FLOAT_BYTES, GIB, Arrangement, CompressedBlocks, Workload

STREAMED_BLOCKS = 2
"""Blocks of a streamed model on the device."""
STAGED_BLOCKS = 3
"""Blocks of a streamed model on the host where they are read from disk."""
PROCESS_HOST_BYTES = {True: int(1.15 * GIB), False: int(0.2 * GIB)}
"""Host memory of any process, by whether it has a GPU: interpreter and libraries, with a GPU its driver."""
NCCL_HOST_BYTES = {True: int(0.35 * GIB), False: 0}
"""Host memory that NCCL keeps for each of several ranks, by whether they have GPUs."""
VAE_KERNELS_HOST_BYTES = {True: int(0.35 * GIB), False: 0}
"""Host memory of kernels that cuDNN and Triton have compiled once the VAE has run, by whether on a GPU."""
DRIVER_CONTEXT_BYTES = int(0.75 * GIB)
"""GPU memory outside PyTorch's count: the driver's context, and what lies unused between allocations."""
FRAGMENTATION_BYTES = int(0.25 * GIB)
"""GPU memory that lies unused between allocations, without the driver's context."""
NCCL_GPU_BYTES, LATER_NCCL_GPU_BYTES = int(2.1 * GIB), int(1.2 * GIB)
"""NCCL's buffers on each of several GPUs, outside PyTorch's count; those of the first collective alone."""
CUBLAS_WORKSPACE_BYTES = 48 * 2**20
"""cuBLAS's workspace on each GPU, in any stage."""


@dataclass(frozen=True)
class StageMemory:
    """Memory of one stage in bytes, by part: on the GPU of one rank, on the host for all ranks of a node."""

    name: str
    gpu_parts: dict[str, int] = field(default_factory=dict)
    host_parts: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        """Sum of the GPU's parts."""
        return sum(self.gpu_parts.values())

    @property
    def host_bytes(self) -> int:
        """Sum of the host's parts."""
        return sum(self.host_parts.values())


def estimate_step_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes that a denoising step takes on one rank beside weights and contexts."""
    return estimate_activation_bytes(workload, arrangement) + _estimate_workspace_bytes(
        workload, arrangement
    )


def _estimate_workspace_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of weights that are decoded for their use, and of decoding them."""
    dims = workload.model_dims.transformer
    if workload.quant in ("int8", "int4"):  # the weight of a linear
        return dims.dim * max(3 * dims.dim, dims.ffn_dim) * workload.itemsize
    if (compressed := _get_compressed_blocks(workload, arrangement)) is None:
        return 0
    merging_bytes = workload.merging_bytes if compressed.num_changed else 0
    return compressed.decoded_bytes + DECODING_BYTES + merging_bytes


def estimate_memory(workload: Workload, arrangement: Arrangement) -> list[StageMemory]:
    """Return the memory of each stage, in the order of a run.

    On a run without a GPU, ``gpu_parts`` are what its tensors take of the host.
    """
    process_parts = {"process": _estimate_process_bytes(workload, has_vae_kernels=False)}
    later_process_parts = {"process": _estimate_process_bytes(workload, has_vae_kernels=True)}
    image_encoder = workload.model_dims.image_encoder
    stages = [_estimate_text_stage(workload, arrangement, process_parts)]
    if image_encoder is not None and workload.num_images:
        stages.append(_estimate_look_stage(image_encoder, arrangement, process_parts))
    if (face_encoder := workload.model_dims.face_encoder) is not None:
        stages.append(StageMemory("face", list_face_parts(face_encoder), process_parts))
    if (audio_encoder := workload.model_dims.audio_encoder) is not None:
        listen_parts = list_encoder_parts(audio_encoder, workload.num_audio_samples)
        stages.append(StageMemory("listen", {}, process_parts | listen_parts))
        later_process_parts |= list_clip_parts(workload)
    if workload.has_encoded_input:
        process_parts = later_process_parts
        stages.append(_estimate_vae_stage(workload, arrangement.image, "image", process_parts))
    stages += [
        _estimate_context_stage(workload, arrangement, process_parts),
        *_list_audio_stages(workload, arrangement, process_parts),
        _estimate_load_stage(workload, arrangement, process_parts),
        _estimate_denoise_stage(workload, arrangement, process_parts),
        _estimate_vae_stage(workload, arrangement.vae, "decode", later_process_parts),
    ]
    library_parts = {"libraries": CUBLAS_WORKSPACE_BYTES} if workload.is_on_gpu else {}
    return [
        replace(stage, gpu_parts=stage.gpu_parts | library_parts) if stage.gpu_parts else stage
        for stage in stages
    ]


def _estimate_process_bytes(workload: Workload, *, has_vae_kernels: bool) -> int:
    """Return the host memory of a node's processes without what they compute with."""
    rank_bytes = PROCESS_HOST_BYTES[workload.is_on_gpu]
    rank_bytes += READING_HOST_BYTES if workload.is_on_gpu else 0
    if workload.num_ranks > 1:
        rank_bytes += NCCL_HOST_BYTES[workload.is_on_gpu]
    if has_vae_kernels:
        rank_bytes += VAE_KERNELS_HOST_BYTES[workload.is_on_gpu]
    return rank_bytes * workload.ranks_per_node


def _estimate_text_stage(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    dims, itemsize = workload.model_dims.text_encoder, workload.itemsize
    block_bytes = count_text_block_bytes(dims, itemsize)
    encoder_bytes = count_text_encoder_bytes(dims, itemsize)
    activation_bytes = max(workload.text_lengths) * (4 * dims.dim + 3 * dims.ffn_dim) * FLOAT_BYTES
    whole_parts = {"weights": encoder_bytes, "activations": activation_bytes}
    if arrangement.t5 == "cpu":
        return StageMemory("text", {}, process_parts | whole_parts)
    if arrangement.t5 == "stream":
        streamed_parts = {
            "weights": STREAMED_BLOCKS * block_bytes,
            "activations": activation_bytes,
        }
        staging_parts = {"staging": STAGED_BLOCKS * block_bytes}
        return StageMemory("text", streamed_parts, process_parts | staging_parts)
    if arrangement.shard_t5:
        sharded_parts = {
            "weights": encoder_bytes // workload.num_ranks,
            "gathered": 2 * block_bytes,
            "activations": activation_bytes,
        }
        return StageMemory("text", sharded_parts, process_parts)
    return StageMemory("text", whole_parts, process_parts)


def _estimate_look_stage(
    dims: ImageEncoderDims, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    clip_parts = {"weights": count_image_encoder_bytes(dims), "activations": int(0.05 * GIB)}
    if arrangement.clip == "cpu":
        return StageMemory("look", {}, process_parts | clip_parts)
    return StageMemory("look", clip_parts, process_parts)


def _estimate_context_stage(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    """Return the memory of projecting contexts, where each rank computes its shard of the blocks for all."""
    dims, itemsize = workload.model_dims.transformer, workload.itemsize
    all_context_bytes, _ = estimate_context_bytes(workload)
    num_blocks = -(-len(dims.context_block_names) // workload.num_ranks)
    staging_parts = {}
    if arrangement.dit != "resident":
        num_blocks = min(STREAMED_BLOCKS, num_blocks)
        block_bytes = count_context_block_bytes(dims, itemsize)
        staging_parts["staging"] = STAGED_BLOCKS * block_bytes * workload.ranks_per_node
    context_shard_bytes = all_context_bytes // workload.num_ranks  # a rank's shard, block by block
    gpu_parts = {
        "weights": count_projection_bytes(dims, itemsize, num_blocks),
        "contexts": context_shard_bytes + all_context_bytes,
    }
    gpu_parts |= _list_merging_parts(workload, arrangement) | list_camera_parts(workload)
    return StageMemory("context", gpu_parts, process_parts | staging_parts)


def _list_audio_stages(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> list[StageMemory]:
    """Return the stage that projects a clip's sound, none without."""
    if not workload.model_dims.transformer.audio_layers:
        return []
    is_resident = arrangement.dit == "resident"
    gpu_parts = list_projection_parts(workload, is_resident=is_resident)
    gpu_parts |= _list_merging_parts(workload, arrangement)
    return [StageMemory("audio", gpu_parts, process_parts)]


def _list_merging_parts(workload: Workload, arrangement: Arrangement) -> dict[str, int]:
    """Return the memory of merging LoRAs where weights are read: of streamed blocks, several at once."""
    if not workload.merging_bytes:
        return {}
    num_at_once = NUM_READERS if arrangement.dit == "resident" else STAGED_BLOCKS
    return {"loras": num_at_once * workload.merging_bytes}


def _estimate_load_stage(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    dims = workload.model_dims.transformer
    all_context_bytes, _ = estimate_context_bytes(workload)
    all_context_bytes += estimate_control_bytes(workload, arrangement)
    weight_bytes = _count_denoise_weight_bytes(workload, arrangement)
    if not arrangement.shard_dit:  # deleted once the timesteps are embedded
        weight_bytes += count_time_embedding_bytes(dims)
    read_buffer_bytes, staging_parts = 0, {}
    if arrangement.dit == "resident":
        read_buffer_bytes = READING_GPU_BYTES
    else:  # blocks that stay on the host come later
        block_bytes = _count_largest_block_bytes(workload, arrangement)
        staging_parts["staging"] = STAGED_BLOCKS * block_bytes * workload.ranks_per_node
    gpu_parts = {
        "weights": weight_bytes,
        "contexts": all_context_bytes,
        "staging": read_buffer_bytes,
    } | _list_merging_parts(workload, arrangement)
    return StageMemory("load", gpu_parts, process_parts | staging_parts)


def _estimate_denoise_stage(
    workload: Workload, arrangement: Arrangement, process_parts: dict[str, int]
) -> StageMemory:
    ranks_per_node = workload.ranks_per_node
    _, own_context_bytes = estimate_context_bytes(workload)
    compressed = _get_compressed_blocks(workload, arrangement)
    block_bytes = _count_largest_block_bytes(workload, arrangement)
    gpu_parts = {
        "weights": _count_denoise_weight_bytes(workload, arrangement),
        "contexts": own_context_bytes + estimate_control_bytes(workload, arrangement),
    }
    if arrangement.shard_dit:
        gpu_parts["gathered"] = 2 * block_bytes
    gpu_parts["activations"] = estimate_activation_bytes(workload, arrangement)
    if compressed is None and arrangement.dit != "resident":
        # In the first step, or in each, blocks are still read.
        gpu_parts |= _list_merging_parts(workload, arrangement)
    if workspace_bytes := _estimate_workspace_bytes(workload, arrangement):
        gpu_parts["workspace"] = workspace_bytes
    host_parts = dict(process_parts)
    if arrangement.dit == "stream":
        host_parts["weights"] = _count_all_blocks_bytes(workload, arrangement) * ranks_per_node
    elif arrangement.dit != "resident":
        host_parts["staging"] = STAGED_BLOCKS * block_bytes * ranks_per_node
    return StageMemory("denoise", gpu_parts, host_parts)


def _get_compressed_blocks(workload: Workload, arrangement: Arrangement) -> CompressedBlocks | None:
    return workload.compressed_blocks if arrangement.gguf == "compressed" else None


def _count_largest_block_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of a transformer's largest block as it is kept; the first is not quantised."""
    if (compressed := _get_compressed_blocks(workload, arrangement)) is not None:
        return compressed.block_bytes
    return count_block_bytes(workload.model_dims.transformer, workload.itemsize)


def _count_all_blocks_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of all of a transformer's blocks as they are kept."""
    if (compressed := _get_compressed_blocks(workload, arrangement)) is not None:
        return compressed.all_bytes
    return count_all_blocks_bytes(
        workload.model_dims.transformer, workload.itemsize, workload.quant
    )


def _count_denoise_weight_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of the transformer's weights on a rank's GPU while it denoises.

    The time embedding is deleted before that, but not from shards.
    """
    dims, itemsize = workload.model_dims.transformer, workload.itemsize
    time_embedding_bytes = count_time_embedding_bytes(dims)
    other_bytes = count_transformer_bytes(dims, itemsize) - count_all_blocks_bytes(
        dims, itemsize, "none"
    )
    blocks_bytes = (
        _count_all_blocks_bytes(workload, arrangement)
        if arrangement.dit == "resident"
        else STREAMED_BLOCKS * _count_largest_block_bytes(workload, arrangement)
    )
    weight_bytes = other_bytes - time_embedding_bytes + blocks_bytes
    if arrangement.shard_dit:  # shards of both experts are there from the start
        all_weight_bytes = workload.num_experts * (weight_bytes + time_embedding_bytes)
        weight_bytes = all_weight_bytes // workload.num_ranks
    return weight_bytes


def _estimate_vae_stage(
    workload: Workload, strategy: VaeStrategy, stage_name: str, process_parts: dict[str, int]
) -> StageMemory:
    dims, itemsize = workload.model_dims.vae, workload.vae_itemsize
    is_encoding = stage_name == "image"
    frames, rows, columns = workload.get_vae_size(encode=is_encoding)
    part_size = (
        min(rows, columns),
        *strategy.compute_largest_part(max(rows, columns), workload.num_ranks, dims),
    )
    activation_bytes = estimate_vae_bytes(
        dims,
        part_size,
        itemsize,
        at_once=strategy.at_once,
        encode=is_encoding,
        is_still=frames == 1,
    )
    parts = {
        "weights": count_vae_weight_bytes(dims, itemsize),
        "activations": activation_bytes,
    }
    if strategy.name == "cpu":
        return StageMemory(stage_name, {}, process_parts | parts)
    return StageMemory(stage_name, parts, process_parts)
