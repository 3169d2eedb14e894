"""Record fields of a video: what it is, lossy settings, and speed."""

from typing import Any

from wan_dist.config.schema import EIGHT_BIT_BACKENDS, RunConfig
from wan_dist.planning.flops import count_forward_flops
from wan_dist.planning.plan import RunPlan, VideoPlan


def describe_video(config: RunConfig, plan: VideoPlan) -> dict[str, Any]:
    """Return the fields that identify a video, made or not: name, prompt, seed, size and lossy settings."""
    size_fields = {
        "width": plan.width,
        "height": plan.height,
        "num_frames": plan.frame_num,
        "fps": plan.fps,
    }
    return {
        "name": plan.name,
        "prompt": plan.prompt,
        "seed": plan.seed,
        **size_fields,
        "distance": list_lossy_settings(config),
    }


def list_lossy_settings(config: RunConfig) -> list[str]:
    """Return the settings that change a result beyond rounding errors."""
    lossy_settings = {
        "quant": config.quant if config.quant != "none" else None,
        "attention": config.attention if config.attention in EIGHT_BIT_BACKENDS else None,
        "cache.steps": config.cache.steps,
    }
    return [f"{key}={value}" for key, value in lossy_settings.items() if value is not None]


def compute_speed(
    plan: RunPlan, seconds: float, num_steps: int, num_guessed_steps: int
) -> dict[str, float]:
    """Return seconds per step, and TFLOP/s of one rank in the steps that the cache did not guess.

    Empty where there is nothing to measure. ``seconds`` are those of all ``num_steps`` steps.
    """
    if num_steps == 0 or seconds == 0:
        return {}
    operations_per_step = len(plan.workload.text_lengths) * count_forward_flops(
        plan.workload.model_dims.transformer, plan.num_tokens
    )
    rank_operations = (
        (num_steps - num_guessed_steps) * operations_per_step / plan.workload.num_ranks
    )
    return {
        "step_seconds": round(seconds / num_steps, 4),
        "tflops": round(rank_operations / seconds / 1e12, 3),
    }
