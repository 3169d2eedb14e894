"""What is said of a video in its record, besides what it cost."""

from typing import Any

from wan_dist.config.schema import EIGHT_BIT_ATTENTION, RunConfig
from wan_dist.planning.flops import forward_operations
from wan_dist.planning.plan import Plan


def described(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return what a video is, or was to be."""
    size = {"width": plan.width, "height": plan.height, "num_frames": plan.frame_num, "fps": plan.fps}
    return {"name": plan.name, "prompt": plan.prompt, "seed": plan.seed, **size, "distance": distance_options(config)}


def distance_options(config: RunConfig) -> list[str]:
    """Return the settings that take a result away from the model's own, beyond rounding."""
    options = {
        "quant": config.quant if config.quant != "none" else None,
        "attention": config.attention if config.attention in EIGHT_BIT_ATTENTION else None,
        "cache.steps": config.cache.steps,
    }
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def speed(plan: Plan, seconds: float, num_steps: int, num_guessed: int) -> dict[str, float]:
    """Return seconds of a step, and of a rank 10^12 operations a second in the steps that were not guessed."""
    if num_steps == 0 or seconds == 0 or plan.load is None:
        return {}
    each = len(plan.load.text_tokens) * forward_operations(plan.load.models.transformer, plan.num_tokens)
    operations = (num_steps - num_guessed) * each / plan.load.num_ranks
    return {"step_seconds": round(seconds / num_steps, 4), "tflops": round(operations / seconds / 1e12, 3)}
