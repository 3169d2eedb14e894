"""The denoising loop and the ways to predict a velocity. Nothing here knows of ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wan_dist.models.transformer import TextKV, WanTransformer
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.solvers import Solver

Predict = Callable[[Tensor, int], Tensor]
"""(latents (B, C, T, h, w), timestep) -> velocity of the same shape."""


class Guidance:
    """Classifier-free guidance (arXiv:2207.12598), both branches one after the other: u + scale (c - u).

    Whatever does not change from step to step is computed here, once: rotary tables, and the text's keys and values.
    """

    def __init__(self, model: WanTransformer, conditioning: Conditioning, latents: Tensor, *, scale: float) -> None:
        self.model = model
        self.scale = scale
        self.rotary = model.rotary(latents)
        self.text: TextKV = model.project_text(conditioning.context)
        self.negative_text = None if conditioning.negative_context is None else model.project_text(conditioning.negative_context)

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the guided velocity (B, C, T, h, w), float32."""
        t = torch.full((latents.shape[0],), timestep, device=latents.device)
        conditional: Tensor = self.model(latents, t, self.text, self.rotary)
        if self.negative_text is None:
            return conditional
        unconditional: Tensor = self.model(latents, t, self.negative_text, self.rotary)
        return unconditional + self.scale * (conditional - unconditional)


def denoise(predict: Predict, latents: Tensor, solver: Solver, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> Tensor:
    """Return the latents at the end of the solver's schedule; latents (B, C, T, h, w) float32 noise.

    ``progress`` wraps the step numbers, e.g. with a bar. Raises FloatingPointError if the result is not finite, as early as after
    the second step.
    """
    for index in progress(range(len(solver))):
        latents = solver.step(index, latents, predict(latents, solver.timesteps[index]))
        if index in (1, len(solver) - 1) and not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the latents are not finite after step {index + 1}: the video would be black. Try another attention backend "
                "(attention=sdpa) or dtype=float32; if both fail too, the weights are damaged"
            )
    return latents
