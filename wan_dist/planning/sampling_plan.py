"""How a video is denoised: guidance and noise schedule, resolved for its task and size; no torch."""

from dataclasses import dataclass

from wan_dist.config.sections import SampleConfig
from wan_dist.planning.noise_schedule import NoiseSchedule, make_noise_schedule, uses_shift
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import AREA_480P, Task


@dataclass(frozen=True)
class SamplingPlan:
    """What the denoising of a video follows."""

    guide_scales: tuple[float, float]
    """For low and for high noise."""
    shift: float
    schedule: NoiseSchedule
    description: str
    """Solver, steps, shift and guidance in a few words."""

    @property
    def is_guided(self) -> bool:
        """Whether any step needs the negative prompt."""
        return self.guide_scales != (1, 1)


def plan_sampling(sample: SampleConfig, task: Task, area: int) -> SamplingPlan:
    """Return the plan for videos of ``area`` pixels a frame.

    Raises InputError for settings that the task does not take.
    """
    guide_scales = _get_guide_scales(sample, task)
    shift = _choose_shift(sample, task, area)
    return SamplingPlan(
        guide_scales=guide_scales,
        shift=shift,
        schedule=make_noise_schedule(sample, shift, task),
        description=_describe_sampling(sample, shift, guide_scales),
    )


def _get_guide_scales(sample: SampleConfig, task: Task) -> tuple[float, float]:
    """Return the guidance scales for (low, high) noise.

    Raises InputError for two different scales if the task has one transformer.
    """
    scales = sample.parse_guide_scales()
    if task.expert_boundary is None and scales[0] != scales[1]:
        raise InputError(
            f"sample.guide_scale={sample.guide_scale}: {task.name} has one transformer "
            "and needs one number"
        )
    return scales


def _choose_shift(sample: SampleConfig, task: Task, area: int) -> float:
    """Return the shift of the noise schedule: the user's, or the task's for an area in pixels."""
    if sample.shift is not None:
        return sample.shift
    if task.default_shifts is None:
        raise InputError(
            f"sample.shift is null, but {task.name} has no default by size; "
            "published defaults are 3.0 to 16.0"
        )
    return task.default_shifts[0] if area <= AREA_480P else task.default_shifts[1]


def _describe_sampling(
    sample: SampleConfig, shift: float, guide_scales: tuple[float, float]
) -> str:
    """Return how latents are denoised, in a few words."""
    low, high = guide_scales
    guidance = f"guidance {low:g}" if low == high else f"guidance {low:g} (low), {high:g} (high)"
    parts = [
        f"{sample.steps} steps of {sample.solver}",
        f"shift {shift:g}" if uses_shift(sample) else "",
        "no guidance, one pass a step" if guide_scales == (1, 1) else guidance,
    ]
    return ", ".join(filter(None, parts))
