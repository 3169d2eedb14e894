"""Steps whose velocity is guessed from earlier ones instead of computed: opt-in, because the result changes."""

import math
from collections.abc import Callable

from torch import Tensor

from wan_dist.sampling.denoise import Predict


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
        agree: Callable[[bool], bool] = bool,
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self.predict, self.threshold, self.agree, self.note = predict, threshold, agree, note
        self.num_first, self.last = max(2, math.ceil(num_steps / 5)), num_steps - 1
        self._count = 0
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

    def _is_guessed(self, step: int, latents: Tensor) -> bool:
        if step < self.num_first or step >= self.last or self._rate is None or self._before is None:
            return False
        self._error += self._rate * _size(latents - self._before[0]) / max(_size(self._before[1]), 1e-12)
        return self.agree(self._error < self.threshold)


def _size(x: Tensor) -> float:
    return x.abs().mean().item()
