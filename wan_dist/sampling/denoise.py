"""Denoising loop of a solver over its schedule, independent of how the model is parallelised."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wan_dist.sampling.solvers import Solver
from wan_dist.sampling.step_cache import VelocityFunction


def denoise_latents(
    predict: VelocityFunction,
    latents: Tensor,
    solver: Solver,
    *,
    first_step: int = 0,
    known_latents: Tensor | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    after_step: Callable[[int, Tensor], None] = lambda num_done, latents: None,
) -> Tensor:
    """Return the latents at the end of the solver's schedule.

    ``latents`` (B, C, T, h, w), float32: noise, or in a resumed run those after the first ``first_step``
    steps. ``known_latents`` (B, C, 1, h, w) replace the first latent frame before and after every step.
    ``progress`` wraps the step numbers, e.g. with a bar; ``after_step`` is called with the number of
    steps done and the latents. Raises FloatingPointError if latents are not finite; checked after the
    second step, so that a run fails early, and at the end.
    """
    latents = _insert_known_frame(latents, known_latents)
    for index in progress(range(first_step, len(solver))):
        latents = solver.step(index, latents, predict(latents, solver.timesteps[index]))
        latents = _insert_known_frame(latents, known_latents)
        if index in (first_step + 1, len(solver) - 1) and not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the latents are not finite after step {index + 1}: the video would be black. "
                "Try another attention backend (attention=sdpa) or dtype=float32; "
                "if both fail too, the weights are damaged"
            )
        after_step(index + 1, latents)
    return latents


def _insert_known_frame(latents: Tensor, known_latents: Tensor | None) -> Tensor:
    return (
        latents
        if known_latents is None
        else torch.cat([known_latents, latents[:, :, known_latents.shape[2] :]], dim=2)
    )
