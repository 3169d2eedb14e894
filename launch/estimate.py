"""How long a run would take, on the safe side; no torch."""

from wan_dist.footprint import Load, image_encoder_bytes, text_encoder_bytes, transformer_bytes
from wan_dist.plan import Plan
from wan_dist.work import forward_operations

_START = 60.0
_DISK = 0.3e9
"""Bytes a second at which weights are read."""
_AROUND = 120.0
"""Seconds of one GPU before and after the steps of a video of 75600 tokens."""
_SPREAD = 0.85
"""How much of its speed a GPU keeps among several."""


def seconds_of(plan: Plan, num_steps: int, tflops: float) -> float:
    """Return the seconds of a run on GPUs of this speed, from its arithmetic and the bytes that it reads."""
    load = plan.load
    assert load is not None
    around = _AROUND * load.num_tokens / 75600 / load.num_ranks
    return _START + _weight_bytes(load) / _DISK + num_steps * step_seconds_of(plan, tflops) + around


def step_seconds_of(plan: Plan, tflops: float) -> float:
    """Return the seconds of one of its steps."""
    load = plan.load
    assert load is not None
    rate = tflops * 1e12 * load.num_ranks * (1.0 if load.num_ranks == 1 else _SPREAD)
    return len(load.text_tokens) * forward_operations(load.models.transformer, load.num_tokens) / rate


def _weight_bytes(load: Load) -> int:
    models, num_experts = load.models, load.num_experts
    images = image_encoder_bytes(models.image_encoder) if models.image_encoder else 0
    return num_experts * transformer_bytes(models.transformer, 2) + text_encoder_bytes(models.text_encoder, 2) + images
