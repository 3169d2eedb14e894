"""Run time estimates, cautious ones, from arithmetic and bytes read; without torch."""

from collections.abc import Sequence

from wan_dist.planning.flops import count_forward_flops
from wan_dist.planning.parameter_bytes import (
    count_image_encoder_bytes,
    count_text_encoder_bytes,
    count_transformer_bytes,
)
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.workload import Workload

_START_SECONDS = 60.0
"""Seconds from the start of the processes until weights are read."""
_DISK_BYTES_PER_SECOND = 0.3e9
"""Rate at which weights are read."""
_OVERHEAD_SECONDS = 120.0
"""Seconds of one GPU before and after the steps of a video of 75600 tokens."""
_MULTI_GPU_EFFICIENCY = 0.85
"""Speed of a GPU among several, relative to one alone."""


def estimate_run_seconds(videos: Sequence[tuple[RunPlan, int]], tflops: float) -> float:
    """Return the seconds of a run on GPUs of ``tflops`` TFLOP/s, from its arithmetic and the bytes it reads.

    ``videos``: plan of each, and steps of a clip; weights are read once, and replicas divide the videos.
    """
    compute_seconds, read_seconds = 0.0, 0.0
    for plan, num_steps in videos:
        workload = plan.workload
        compute_seconds += plan.num_clips * (
            num_steps * estimate_step_seconds(plan, tflops)
            + _OVERHEAD_SECONDS * workload.num_tokens / 75600 / workload.num_ranks
        )
        read_seconds = max(read_seconds, _estimate_weight_bytes(workload) / _DISK_BYTES_PER_SECOND)
    num_replicas = videos[0][0].degrees.dp
    num_rounds = -(-len(videos) // num_replicas)  # the last one may not be full
    round_factor = num_rounds * num_replicas / len(videos)
    return _START_SECONDS + read_seconds + compute_seconds * round_factor / num_replicas


def estimate_step_seconds(plan: RunPlan, tflops: float) -> float:
    """Return the seconds of one denoising step of a plan, with its guidance passes."""
    workload = plan.workload
    efficiency = 1.0 if workload.num_ranks == 1 else _MULTI_GPU_EFFICIENCY
    operations_per_second = tflops * 1e12 * workload.num_ranks * efficiency
    return (
        len(workload.text_lengths)
        * count_forward_flops(workload.model_dims.transformer, workload.num_tokens)
        / operations_per_second
    )


def _estimate_weight_bytes(workload: Workload) -> int:
    models, num_experts = workload.model_dims, workload.num_experts
    encoder_bytes = count_image_encoder_bytes(models.image_encoder) if models.image_encoder else 0
    return (
        num_experts * count_transformer_bytes(models.transformer, 2)
        + count_text_encoder_bytes(models.text_encoder, 2)
        + encoder_bytes
    )
