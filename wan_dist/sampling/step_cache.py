"""Steps that are guessed from earlier ones instead of computed: opt-in, because the result changes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wan_dist.tasks.registry import TeaFit

Predict = Callable[[Tensor, int], Tensor]
"""(latents (B, C, T, h, w), timestep) -> velocity of the same shape."""


class EasyCache:
    """A prediction that is guessed while it would hardly change (EasyCache, arXiv:2507.02860).

    From one step to the next the velocity changes in proportion to the latents; the proportion k is measured in the last two steps that
    were computed. k |Δx| / |v| is how much the velocity should have changed since, relative to its size: while these sum up to less than
    ``threshold``, the velocity is taken to be as far from the latents as in the last computed step. The first fifth of the ``num_steps``
    steps and the last one are always computed. ``agree`` makes of this rank's decision that of all ranks, ``note`` is called at each guess.
    """

    def __init__(
        self,
        predict: Predict,
        *,
        num_steps: int,
        threshold: float,
        num_done: int = 0,
        agree: Callable[[bool], bool] = bool,
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self.predict, self.threshold, self.agree, self.note = predict, threshold, agree, note
        self.num_first, self.last = max(2, math.ceil(num_steps / 5)), num_steps - 1
        self._count = num_done
        self._error = 0.0
        self._rate: float | None = None
        self._before: tuple[Tensor, Tensor] | None = None
        self._offset: Tensor | float = 0.0

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the velocity, computed or guessed."""
        step, self._count = self._count, self._count + 1
        if self._is_guessed(step, latents):
            self.note()
            velocity = latents + self._offset
        else:
            velocity = self.predict(latents, timestep)
            self._offset = velocity - latents
            self._error = 0.0
            if self._before is not None:
                self._rate = _size(velocity - self._before[1]) / max(_size(latents - self._before[0]), 1e-12)
        self._before = latents, velocity
        return velocity

    def state(self) -> dict[str, Tensor]:
        """Return what `go_on` needs to guess the same in another run; nothing before the first step."""
        if self._before is None or isinstance(self._offset, float):
            return {}
        numbers = torch.tensor([self._error, math.nan if self._rate is None else self._rate], dtype=torch.float64)
        return {"latents": self._before[0], "velocity": self._before[1], "offset": self._offset, "numbers": numbers}

    def go_on(self, state: dict[str, Tensor]) -> None:
        """Take over the state after the steps that are done."""
        self._before, self._offset = (state["latents"], state["velocity"]), state["offset"]
        self._error, rate = state["numbers"].tolist()
        self._rate = None if math.isnan(rate) else rate

    def _is_guessed(self, step: int, latents: Tensor) -> bool:
        if step < self.num_first or step >= self.last or self._rate is None or self._before is None:
            return False
        self._error += self._rate * _size(latents - self._before[0]) / max(_size(self._before[1]), 1e-12)
        return self.agree(self._error < self.threshold)


def _size(x: Tensor) -> float:
    return x.abs().mean().item()


class TeaCache:
    """Decides which steps take what the blocks added to the tokens in the last computed one (TeaCache, arXiv:2411.19108).

    How much the blocks' result changes is foreseen from how much the embedding of the timestep does, by the model's ``fit``; while it sums
    up to less than the fit's threshold, steps are guessed. The first ``num_first`` are computed. ``agree`` and ``note``: see `EasyCache`.
    """

    def __init__(
        self,
        fit: TeaFit,
        *,
        num_first: int = 5,
        num_done: int = 0,
        agree: Callable[[bool], bool] = bool,
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self.fit, self.num_first, self.agree, self.note = fit, num_first, agree, note
        self._count, self._change = num_done, 0.0
        self._before: Tensor | None = None
        self._decision: bool | None = None

    def begin(self) -> None:
        """Begin a step: the decision is the same for all that is computed in it."""
        self._decision = None

    def __call__(self, embedding: Tensor) -> bool:
        """Whether this step is guessed, by its timestep's embedding as the blocks are modulated with it."""
        if self._decision is None:
            self._decision = self._decide(embedding)
            self._before = embedding
            self._count += 1
            if self._decision:
                self.note()
        return self._decision

    def _decide(self, embedding: Tensor) -> bool:
        if self._before is None or self._count < self.num_first:
            return False
        relative = _size(embedding - self._before) / max(_size(self._before), 1e-12)
        foreseen = sum(factor * relative**power for power, factor in enumerate(reversed(self.fit.coefficients)))
        self._change += max(foreseen, relative)  # where it was not fitted, with few steps, a polynomial may fall far below 0
        is_guessed = self.agree(self._change < self.fit.threshold)
        if not is_guessed:
            self._change = 0.0
        return is_guessed
