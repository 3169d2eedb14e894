"""Velocity prediction: classifier-free guidance, and the switch between two experts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from wan_dist.models.control import NO_CONTROL, ControlTokens
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer, ResidualCache
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.step_cache import TeaCache, VelocityFunction


class VelocityPredictor:
    """The transformer's velocity for each context; what is the same at all steps is computed once.

    ``separate_contexts``: one context after the other passes through the whole model, rather than all
    together through each block. ``tea_cache`` decides at which steps the blocks are not computed, and
    their residual of the last computed step is added to the tokens instead. ``next_timesteps``: for a model
    that is told of them, `NoiseSchedule.next_timesteps`.
    """

    def __init__(
        self,
        model: FusedTransformer,
        contexts: Sequence[ContextKV],
        conditioning: Conditioning,
        latents: Tensor,
        *,
        separate_contexts: bool = False,
        tea_cache: TeaCache | None = None,
        next_timesteps: Mapping[float, float] | None = None,
        control: ControlTokens = NO_CONTROL,
    ) -> None:
        self.model = model
        self.control = control
        self.next_timesteps = next_timesteps or {}
        self.tea_cache = tea_cache
        self.context_groups = (
            [[context] for context in contexts] if separate_contexts else [contexts]
        )
        self.residual_caches = [
            None if tea_cache is None else ResidualCache(tea_cache) for _ in self.context_groups
        ]
        self.extra_channels = conditioning.extra_channels
        self.has_known_frame = conditioning.known_latents is not None
        self.has_reference = control.reference is not None
        self.rotary = model.compute_rotary(latents, int(self.has_reference))

    def __call__(self, latents: Tensor, timestep: float) -> list[Tensor]:
        """Return the velocity (B, C, T, h, w), float32, for each context."""
        timesteps = make_timestep_rows(
            timestep,
            self.next_timesteps.get(timestep),
            has_known_frame=self.has_known_frame,
            has_reference=self.has_reference,
        )
        if self.extra_channels is not None:
            latents = torch.cat([latents, self.extra_channels], dim=1)
        velocities: list[Tensor] = []
        if self.tea_cache is not None:
            self.tea_cache.start_step()
        for contexts, residual_cache in zip(self.context_groups, self.residual_caches, strict=True):
            velocities += self.model(
                latents, timesteps, contexts, self.rotary, residual_cache, self.control
            )
        return velocities


def make_timestep_rows(
    timestep: float,
    next_timestep: float | None = None,
    *,
    has_known_frame: bool,
    has_reference: bool = False,
) -> Tensor:
    """Return the timesteps (1, R) of a video's tokens: 0 for a known first frame, which has no noise.

    Tokens of a reference image before it have the timestep of the others. With ``next_timestep`` they are
    (1, R, 2); see `WanTransformer.embed_timesteps`.
    """
    first_rows = ((timestep, 0) if has_reference else (0,)) if has_known_frame else ()
    rows = torch.tensor([(*first_rows, timestep)])
    if next_timestep is None:
        return rows
    next_rows = make_timestep_rows(
        next_timestep, has_known_frame=has_known_frame, has_reference=has_reference
    )
    return torch.stack([rows, next_rows], -1)


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return u + scale (c - u), classifier-free guidance (arXiv:2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


class Guidance:
    """Classifier-free guidance with a negative prompt; without one, the prompt's velocity unchanged."""

    def __init__(self, velocity_predictor: VelocityPredictor, *, scale: float) -> None:
        self.velocity_predictor, self.scale = velocity_predictor, scale

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the guided velocity (B, C, T, h, w), float32."""
        conditional, *unconditional = self.velocity_predictor(latents, timestep)
        return (
            apply_guidance(conditional, unconditional[0], self.scale)
            if unconditional
            else conditional
        )


class ExpertSwitch:
    """Switch between a high-noise and a low-noise expert; the first is evicted when it is no longer needed.

    ``load_high_noise`` and ``load_low_noise`` load an expert: at its first timestep, after the other was
    evicted, so that only one exists at a time; or, with ``load_early``, both before the first step, so that
    nothing waits at the switch. ``boundary``: the lowest timestep of the high-noise expert.
    """

    def __init__(
        self,
        load_high_noise: Callable[[], VelocityFunction],
        load_low_noise: Callable[[], VelocityFunction],
        *,
        boundary: float,
        load_early: bool = False,
    ) -> None:
        self.expert_loaders = {True: load_high_noise, False: load_low_noise}
        self.boundary = boundary
        self.loaded_experts: dict[bool, VelocityFunction] = (
            {is_high: load_expert() for is_high, load_expert in self.expert_loaders.items()}
            if load_early
            else {}
        )

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the velocity by this timestep's expert: the high-noise one at the boundary and above."""
        is_high = timestep >= self.boundary
        if not is_high:
            self.loaded_experts.pop(True, None)  # timesteps never increase
        if is_high not in self.loaded_experts:
            self.loaded_experts[is_high] = self.expert_loaders[is_high]()
        return self.loaded_experts[is_high](latents, timestep)
