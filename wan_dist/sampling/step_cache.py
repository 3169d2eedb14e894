"""Step caches: steps are guessed from earlier ones instead of computed; opt-in, as the result changes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wan_dist.tasks.base import TeaCacheFit

VelocityFunction = Callable[[Tensor, float], Tensor]
"""(latents (B, C, T, h, w), timestep) -> velocity of the same shape."""


class EasyCache:
    """Step cache that guesses the velocity while it would hardly change (EasyCache, arXiv:2507.02860).

    From one step to the next the velocity changes in proportion to the latents; the proportion k is
    measured at each computed step, from the step before it. k |Δx| / |v| is how much the velocity should
    change in a step, relative to its size: while the sum since the last computed step is less than
    ``threshold``, the velocity is guessed to differ from the latents by as much as in that step. The
    first fifth of the ``num_steps`` steps and the last one are always computed. ``num_done`` steps were
    done before a run was resumed. ``agree`` turns this rank's decision into that of all ranks,
    ``on_guess`` is called at each guess.
    """

    def __init__(
        self,
        predict: VelocityFunction,
        *,
        num_steps: int,
        threshold: float,
        num_done: int = 0,
        agree: Callable[[bool], bool] = bool,
        on_guess: Callable[[], None] = lambda: None,
    ) -> None:
        self.predict, self.threshold = predict, threshold
        self.agree, self.on_guess = agree, on_guess
        self.num_warmup_steps, self.last_step = max(2, math.ceil(num_steps / 5)), num_steps - 1
        self._next_step = num_done
        self._accumulated_error = 0.0
        self._change_rate: float | None = None
        self._previous_step: tuple[Tensor, Tensor] | None = None
        self._velocity_offset: Tensor | float = 0.0

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the velocity, computed or guessed."""
        step, self._next_step = self._next_step, self._next_step + 1
        if self._decide_to_guess(step, latents):
            self.on_guess()
            velocity = latents + self._velocity_offset
        else:
            velocity = self.predict(latents, timestep)
            self._velocity_offset = velocity - latents
            self._accumulated_error = 0.0
            if self._previous_step is not None:
                previous_latents, previous_velocity = self._previous_step
                velocity_change = _measure_magnitude(velocity - previous_velocity)
                latent_change = _measure_magnitude(latents - previous_latents)
                self._change_rate = velocity_change / max(latent_change, 1e-12)
        self._previous_step = latents, velocity
        return velocity

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to guess the same in a resumed run; nothing before the first step."""
        if self._previous_step is None or isinstance(self._velocity_offset, float):
            return {}
        rate = math.nan if self._change_rate is None else self._change_rate
        numbers = torch.tensor([self._accumulated_error, rate], dtype=torch.float64)
        return {
            "latents": self._previous_step[0],
            "velocity": self._previous_step[1],
            "offset": self._velocity_offset,
            "numbers": numbers,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the state after the steps that are done."""
        self._previous_step = state["latents"], state["velocity"]
        self._velocity_offset = state["offset"]
        self._accumulated_error, rate = state["numbers"].tolist()
        self._change_rate = None if math.isnan(rate) else rate

    def _decide_to_guess(self, step: int, latents: Tensor) -> bool:
        if (
            step < self.num_warmup_steps
            or step >= self.last_step
            or self._change_rate is None
            or self._previous_step is None
        ):
            return False
        self._accumulated_error += (
            self._change_rate
            * _measure_magnitude(latents - self._previous_step[0])
            / max(_measure_magnitude(self._previous_step[1]), 1e-12)
        )
        return self.agree(self._accumulated_error < self.threshold)


def _measure_magnitude(x: Tensor) -> float:
    return x.abs().mean().item()


class TeaCache:
    """Step cache that decides when the blocks' last residual is reused (TeaCache, arXiv:2411.19108).

    How much the blocks' result changes is predicted by the model's ``fit`` from how much the embedding of the
    timestep does; while the sum is less than the fit's threshold, steps are guessed. The first
    ``num_warmup_steps`` are computed. ``num_done``, ``agree`` and ``on_guess``: see `EasyCache`.
    """

    def __init__(
        self,
        fit: TeaCacheFit,
        *,
        num_warmup_steps: int = 5,
        num_done: int = 0,
        agree: Callable[[bool], bool] = bool,
        on_guess: Callable[[], None] = lambda: None,
    ) -> None:
        self.fit, self.num_warmup_steps = fit, num_warmup_steps
        self.agree, self.on_guess = agree, on_guess
        self._next_step, self._accumulated_change = num_done, 0.0
        self._previous_embedding: Tensor | None = None
        self._decision: bool | None = None

    def start_step(self) -> None:
        """Start a step, in which one decision holds for all contexts."""
        self._decision = None

    def __call__(self, embedding: Tensor) -> bool:
        """Whether this step is guessed, by its timestep's embedding, the one that modulates the blocks."""
        if self._decision is None:
            self._decision = self._decide_to_guess(embedding)
            self._previous_embedding = embedding
            self._next_step += 1
            if self._decision:
                self.on_guess()
        return self._decision

    def _decide_to_guess(self, embedding: Tensor) -> bool:
        if self._previous_embedding is None or self._next_step < self.num_warmup_steps:
            return False
        relative_change = _measure_magnitude(embedding - self._previous_embedding) / max(
            _measure_magnitude(self._previous_embedding), 1e-12
        )
        predicted_change = sum(
            coefficient * relative_change**power
            for power, coefficient in enumerate(reversed(self.fit.coefficients))
        )
        # Where it was not fitted, with few steps, a polynomial may fall far below 0.
        self._accumulated_change += max(predicted_change, relative_change)
        is_guessed = self.agree(self._accumulated_change < self.fit.threshold)
        if not is_guessed:
            self._accumulated_change = 0.0
        return is_guessed
