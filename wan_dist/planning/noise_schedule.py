"""Noise schedules: the noise level of each denoising step, and what the model is told of it; no torch.

x_σ = (1 - σ) x₀ + σ ε. The schedules of the base models are the reference implementation's. Few-step models
are run as they were trained: LightX2V and Wan2.2-Lightning with levels that are evenly spaced and shifted,
FastWan and CausVid with a list, rCM with levels from angles (arXiv:2510.08431).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wan_dist.config.sections import SampleConfig
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task

NUM_TRAIN_TIMESTEPS = 1000
"""Noise levels that the models are trained on."""
_LARGEST_SIGMAS = {"unipc": float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))}
"""By solver; 1 for others. The reference's UniPC starts from the largest of its float32 training schedule."""
_TIMESTEP_FORMATS = {"lcm": "float", "fun_euler": "float", "rcm": "bfloat16", "rcm_ode": "bfloat16"}
"""How timesteps are rounded, by solver; to integers for others, as the base models were trained."""
_FUN_SOLVER = "fun_euler"
_SMALLEST_FUN_SIGMA = 1 / NUM_TRAIN_TIMESTEPS
"""Before the shift, which is applied to it twice."""
_RCM_SOLVERS = ("rcm", "rcm_ode")
_RCM_ANGLES = (1.5, 1.4, 1.0)
"""Of the steps after the first one, which starts at the largest noise (rCM's published samplers)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels of a run's steps."""

    timesteps: tuple[float, ...]
    """What the model is told at each step, in [0, 1000]."""
    sigmas: tuple[float, ...]
    """Noise level at each step, decreasing, and a final 0."""

    @property
    def next_timesteps(self) -> dict[float, float]:
        """By each timestep that of the step that follows, 0 for the last: some models are told both."""
        return dict(zip(self.timesteps, (*self.timesteps[1:], 0.0), strict=True))

    def __len__(self) -> int:
        return len(self.timesteps)


def uses_shift(sample: SampleConfig) -> bool:
    """Whether the shift decides the noise levels: those of a list and of rCM are fixed."""
    return sample.sigmas is None and sample.solver not in _RCM_SOLVERS


def make_noise_schedule(sample: SampleConfig, shift: float, task: Task) -> NoiseSchedule:
    """Return the schedule that these settings give a task.

    Raises InputError for more steps than rCM's schedule has, and for timesteps that do not fit the sigmas.
    """
    if sample.sigmas is not None:
        exact_sigmas = [*map(float, sample.sigmas), 0.0]
    elif sample.solver in _RCM_SOLVERS:
        exact_sigmas = compute_rcm_sigmas(sample.steps, _choose_sigma_max(sample, task))
    elif sample.solver == _FUN_SOLVER:
        exact_sigmas = compute_fun_sigmas(sample.steps, shift)
    else:
        exact_sigmas = compute_shifted_sigmas(
            sample.steps, shift, largest_sigma=_LARGEST_SIGMAS.get(sample.solver, 1.0)
        )
    timesteps = sample.timesteps or _TIMESTEP_FORMATS.get(sample.solver, "integer")
    if not isinstance(timesteps, str):
        _check_num_timesteps(timesteps, len(exact_sigmas) - 1)
        numbers = [float(timestep) for timestep in timesteps]
    else:
        numbers = [round_timestep(sigma, timesteps) for sigma in exact_sigmas[:-1]]
    # rCM's latents are in float64, the others' sigmas in float32.
    is_rounded = sample.solver not in _RCM_SOLVERS
    sigmas = np.asarray(exact_sigmas, np.float32).tolist() if is_rounded else exact_sigmas
    return NoiseSchedule(tuple(numbers), tuple(sigmas))


def compute_shifted_sigmas(num_steps: int, shift: float, *, largest_sigma: float) -> list[float]:
    """Return ``num_steps`` decreasing noise levels and a final 0.

    They are s σ / (1 + (s - 1) σ), s being the shift and σ evenly spaced from ``largest_sigma`` to 0.
    """
    sigmas = np.linspace(largest_sigma, 0, num_steps + 1)[:-1]
    return [*_shift_sigmas(sigmas, shift).tolist(), 0.0]


def compute_fun_sigmas(num_steps: int, shift: float) -> list[float]:
    """Return the noise levels of VideoX-Fun's Euler scheduler and a final 0.

    They are evenly spaced from 1 to an end that is shifted already, then shifted.
    """
    end = _shift_sigmas(np.array(_SMALLEST_FUN_SIGMA), shift)
    return [*_shift_sigmas(np.linspace(1, end, num_steps), shift).tolist(), 0.0]


def _shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def compute_rcm_sigmas(num_steps: int, sigma_max: float) -> list[float]:
    """Return rCM's noise levels and a final 0.

    They are sin φ / (sin φ + cos φ) of its angles φ, the first of which is atan(``sigma_max``). Raises
    InputError for more steps than there are angles.
    """
    if num_steps > len(_RCM_ANGLES) + 1:
        raise InputError(
            f"sample.steps={num_steps} must be at most {len(_RCM_ANGLES) + 1} with rCM's schedule, which "
            "has no further noise levels; sample.sigmas=[...] takes others"
        )
    angles = _RCM_ANGLES[: num_steps - 1]
    levels = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
    return [sigma_max / (1 + sigma_max), *levels, 0.0]


def _choose_sigma_max(sample: SampleConfig, task: Task) -> float:
    """Return rCM's largest noise, as a ratio to the video: the user's, or as published for the task."""
    if sample.sigma_max is not None:
        return sample.sigma_max
    return 200.0 if task.expert_boundary is not None and task.inputs.is_required else 80.0


def round_timestep(sigma: float, timestep_format: str) -> float:
    """Return 1000 times a noise level, as an integer (truncated), in float32, or rounded to bfloat16."""
    if timestep_format == "integer":
        return int(sigma * NUM_TRAIN_TIMESTEPS)
    timestep = np.float32(sigma) * np.float32(NUM_TRAIN_TIMESTEPS)
    if timestep_format == "bfloat16":
        bits = timestep.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(
            0xFFFF0000
        )
        timestep = bits.view(np.float32)
    return float(timestep)


def _check_num_timesteps(timesteps: Sequence[object], num_steps: int) -> None:
    if len(timesteps) != num_steps:
        raise InputError(
            f"sample.timesteps has {len(timesteps)} numbers for {num_steps} steps; "
            "give one for each of sample.sigmas"
        )
