"""Predictions of a velocity: classifier-free guidance, and two experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wan_dist.models.transformer import Added, ContextKV, WanTransformer
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.step_cache import Predict, TeaCache


class Velocities:
    """The transformer's velocity for each context. What does not change from step to step is kept.

    ``apart``: one context after the other goes through the whole model, rather than together through each block. ``tea`` decides
    at which steps the blocks are not computed, but taken to add to the tokens what they added last.
    """

    def __init__(
        self,
        model: WanTransformer,
        contexts: Sequence[ContextKV],
        conditioning: Conditioning,
        latents: Tensor,
        *,
        apart: bool = False,
        tea: TeaCache | None = None,
    ) -> None:
        self.model = model
        self.tea = tea
        self.groups = [[context] for context in contexts] if apart else [contexts]
        self.added = [None if tea is None else Added(tea) for _ in self.groups]
        self.extra_channels = conditioning.extra_channels
        self.has_known_frame = conditioning.known_latents is not None
        self.rotary = model.rotary(latents)

    def __call__(self, latents: Tensor, timestep: int) -> list[Tensor]:
        """Return for each context the velocity (B, C, T, h, w), float32."""
        timesteps = rows_of(timestep, has_known_frame=self.has_known_frame)
        if self.extra_channels is not None:
            latents = torch.cat([latents, self.extra_channels], dim=1)
        velocities: list[Tensor] = []
        if self.tea is not None:
            self.tea.begin()
        for group, added in zip(self.groups, self.added, strict=True):
            velocities += self.model(latents, timesteps, group, self.rotary, added)
        return velocities


def rows_of(timestep: int, *, has_known_frame: bool) -> Tensor:
    """Return the timesteps (1, R) of a video's tokens: a first frame that is known has no noise."""
    return torch.tensor([(0, timestep) if has_known_frame else (timestep,)])


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return u + scale (c - u), classifier-free guidance (arXiv:2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


class Guidance:
    """Classifier-free guidance of the prompt's velocity and the negative prompt's; without that one it is the prompt's alone."""

    def __init__(self, velocities: Velocities, *, scale: float) -> None:
        self.velocities, self.scale = velocities, scale

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the guided velocity (B, C, T, h, w), float32."""
        conditional, *unconditional = self.velocities(latents, timestep)
        return guided(conditional, unconditional[0], self.scale) if unconditional else conditional


class TwoExperts:
    """One prediction for strong noise, another for weak; what will not be needed any more is let go.

    ``open_high`` and ``open_low`` load an expert: when its first timestep comes, after the other has gone, so that only one exists
    at a time; or, with ``early``, both before the first step, so that nothing waits at the switch.
    """

    def __init__(self, open_high: Callable[[], Predict], open_low: Callable[[], Predict], *, boundary: float, early: bool = False) -> None:
        self.openers = {True: open_high, False: open_low}
        self.boundary = boundary
        self.opened: dict[bool, Predict] = {is_high: opener() for is_high, opener in self.openers.items()} if early else {}

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the velocity by the expert for this timestep: the high-noise one from the boundary on."""
        is_high = timestep >= self.boundary
        if not is_high:
            self.opened.pop(True, None)  # the noise never grows
        if is_high not in self.opened:
            self.opened[is_high] = self.openers[is_high]()
        return self.opened[is_high](latents, timestep)
