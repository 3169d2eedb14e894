"""Resident models between the videos of one run: whether memory suffices; no torch."""

from dataclasses import replace

from wan_dist.planning.audio_memory import count_audio_projection_bytes
from wan_dist.planning.memory_estimate import StageMemory
from wan_dist.planning.parameter_bytes import (
    count_image_encoder_bytes,
    count_projection_bytes,
    count_vae_weight_bytes,
)
from wan_dist.planning.plan import RunPlan


def plan_resident_models(plan: RunPlan, *, num_experts: int = 1) -> RunPlan:
    """Return the plan with the memory of a run whose models stay loaded from video to video.

    All models but the text encoder stay; of a task with two experts, ``num_experts`` of them (1 or 2). The
    plan of a video that is decoded from saved latents is returned as it is.
    """
    workload, arrangement = plan.workload, plan.arrangement
    denoise_stage = next((stage for stage in plan.stage_memories if stage.name == "denoise"), None)
    if denoise_stage is None:
        return plan
    gpu_weight_bytes, host_weight_bytes = (
        denoise_stage.gpu_parts["weights"],
        denoise_stage.host_parts.get("weights", 0),
    )
    if not arrangement.shard_dit:  # shards of both experts are there anyway
        gpu_weight_bytes *= num_experts
    gpu_weight_bytes += count_vae_weight_bytes(workload.model_dims.vae, workload.vae_itemsize)
    if arrangement.dit == "resident":
        dims = workload.model_dims.transformer
        gpu_weight_bytes += num_experts * count_projection_bytes(
            dims, workload.itemsize, -(-len(dims.context_block_names) // workload.num_ranks)
        )
        if dims.audio_layers:
            gpu_weight_bytes += count_audio_projection_bytes(
                dims, workload.itemsize, -(-len(dims.audio_layers) // workload.num_ranks)
            )
    if workload.model_dims.image_encoder is not None and workload.num_images:
        clip_bytes = count_image_encoder_bytes(workload.model_dims.image_encoder)
        if arrangement.clip == "gpu":
            gpu_weight_bytes += clip_bytes
        else:
            host_weight_bytes += clip_bytes
    gpu_weights = {"weights": gpu_weight_bytes}
    host_weights = {"weights": host_weight_bytes} if host_weight_bytes else {}

    def add_resident_weights(stage: StageMemory) -> StageMemory:
        if stage.name == "text":  # runs for all videos before anything else is loaded
            return stage
        return replace(
            stage,
            gpu_parts=stage.gpu_parts | gpu_weights,
            host_parts=stage.host_parts | host_weights,
        )

    return replace(plan, stage_memories=tuple(map(add_resident_weights, plan.stage_memories)))


def can_keep_models(plan: RunPlan, *, num_experts: int = 1) -> bool:
    """Whether the models fit in memory as in `plan_resident_models`.

    Weights that are read from disk each step do not stay.
    """
    workload, budget, arrangement = plan.workload, plan.budget, plan.arrangement
    if arrangement.dit == "disk" or (num_experts > 1 and arrangement.dit != "resident"):
        return False
    stages = plan_resident_models(plan, num_experts=num_experts).stage_memories
    if budget.gpu_bytes is None:
        return all(
            stage.host_bytes + workload.ranks_per_node * stage.gpu_bytes <= budget.host_bytes
            for stage in stages
        )
    return all(
        stage.gpu_bytes <= budget.gpu_bytes and stage.host_bytes <= budget.host_bytes
        for stage in stages
    )


def can_keep_experts(plan: RunPlan) -> bool:
    """Whether both experts of a task that has two may stay, so that a video starts with the first loaded."""
    return plan.workload.num_experts > 1 and can_keep_models(plan, num_experts=2)


def can_buffer_frames(plan: RunPlan, itemsize: int) -> bool:
    """Whether host memory holds decoded videos as well as the largest stage of the plan.

    ``itemsize``: bytes of a value of the frames.
    """
    workload, budget = plan.workload, plan.budget
    peak_host_bytes = max(
        stage.host_bytes
        + (workload.ranks_per_node * stage.gpu_bytes if budget.gpu_bytes is None else 0)
        for stage in plan.stage_memories
    )
    num_local_replicas = max(1, workload.ranks_per_node // workload.num_ranks)
    return (
        peak_host_bytes
        + 2 * num_local_replicas * 3 * plan.frame_num * plan.height * plan.width * itemsize
        <= budget.host_bytes
    )
