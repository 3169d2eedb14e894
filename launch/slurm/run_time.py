"""How long a run would take, on the safe side; no torch."""

from collections.abc import Sequence

from wan_dist.planning.flops import forward_operations
from wan_dist.planning.parameter_bytes import image_encoder_bytes, text_encoder_bytes, transformer_bytes
from wan_dist.planning.plan import Plan
from wan_dist.planning.workload import Load

_START = 60.0
_DISK = 0.3e9
"""Bytes a second at which weights are read."""
_AROUND = 120.0
"""Seconds of one GPU before and after the steps of a video of 75600 tokens."""
_SPREAD = 0.85
"""How much of its speed a GPU keeps among several."""


def seconds_of(videos: Sequence[tuple[Plan, int]], tflops: float) -> float:
    """Return the seconds of a run on GPUs of this speed, from its arithmetic and the bytes that it reads.

    ``videos``: plans, and their steps; weights are read once, and replicas share the videos.
    """
    working, read = 0.0, 0.0
    for plan, num_steps in videos:
        load = plan.load
        assert load is not None
        working += num_steps * step_seconds_of(plan, tflops) + _AROUND * load.num_tokens / 75600 / load.num_ranks
        read = max(read, _weight_bytes(load) / _DISK)
    rounds = -(-len(videos) // (dp := videos[0][0].degrees.dp)) * dp / len(videos)  # the last round may not be full
    return _START + read + working * rounds / dp


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
