"""Flow-matching solvers with the shifted schedules of the reference implementation.

x_σ = (1 - σ) x₀ + σ ε and the model predicts the velocity v = ε - x₀, so x₀ = x - σ v. With α = 1 - σ and λ = log α - log σ.
Coefficients are computed in float64 from float32 sigmas; latents stay in their own dtype.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from wan_dist.tasks.registry import NUM_TRAIN_TIMESTEPS


def shifted_sigmas(steps: int, shift: float, *, largest: float) -> list[float]:
    """Return ``steps`` noise levels from shifted ``largest`` downwards and a final 0: s σ / (1 + (s - 1) σ), σ evenly spaced."""
    sigmas = np.linspace(largest, 0, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return [*sigmas.tolist(), 0.0]


def _log_snr(sigma: float) -> float:
    """Half the log signal-to-noise ratio λ; infinite at both ends."""
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log1p(-sigma) - math.log(sigma)


class Solver(ABC):
    """Steps from noise to data along a fixed schedule.

    ``timesteps`` are what the model is given: 1000 σ cut to an integer, as in the reference. ``sigmas`` has one entry more, 0.
    """

    largest_sigma = 1.0

    def __init__(self, steps: int, shift: float) -> None:
        exact = shifted_sigmas(steps, shift, largest=self.largest_sigma)
        self.timesteps = [int(sigma * NUM_TRAIN_TIMESTEPS) for sigma in exact[:-1]]
        self.sigmas = np.asarray(exact, dtype=np.float32).tolist()

    def __len__(self) -> int:
        return len(self.timesteps)

    @abstractmethod
    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Return the latents at ``sigmas[index + 1]`` from those at ``sigmas[index]`` and the model's velocity there.

        Indices must come in order from 0: multistep solvers remember earlier steps.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered of earlier steps, for `go_on`."""
        return {}

    def go_on(self, num_done: int, state: dict[str, Tensor]) -> None:  # noqa: B027  # there may be nothing to remember
        """Remember what a solver of the same schedule did after this many steps."""


class Euler(Solver):
    """First order: x += (σ' - σ) v."""

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`."""
        return latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


class DpmSolverPlusPlus(Solver):
    """DPM-Solver++(2M), midpoint (arXiv:2211.01095, algorithm 2); first and last step are first order."""

    def __init__(self, steps: int, shift: float) -> None:
        super().__init__(steps, shift)
        self._previous: Tensor | None = None

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`."""
        sigma, target = self.sigmas[index], self.sigmas[index + 1]
        data = latents - sigma * velocity
        h = _log_snr(target) - _log_snr(sigma)
        direction = data
        if self._previous is not None and index < len(self) - 1:
            ratio = (_log_snr(sigma) - _log_snr(self.sigmas[index - 1])) / h
            direction = data + 0.5 / ratio * (data - self._previous)
        self._previous = data
        return target / sigma * latents - (1 - target) * math.expm1(-h) * direction

    def state(self) -> dict[str, Tensor]:
        """See `Solver.state`."""
        return {} if self._previous is None else {"previous": self._previous}

    def go_on(self, num_done: int, state: dict[str, Tensor]) -> None:
        """See `Solver.go_on`."""
        self._previous = state.get("previous")


class UniPC(Solver):
    """UniPC of order 2 in data prediction with B(h) = e^h - 1 (arXiv:2302.04867, algorithms 5 and 8)."""

    # The reference starts from the largest sigma of its float32 training schedule, not from 1.
    largest_sigma = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))

    def __init__(self, steps: int, shift: float) -> None:
        super().__init__(steps, shift)
        self._data: list[Tensor] = []
        self._start: Tensor | None = None  # where the last prediction started from
        self._order = 1

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`; the arriving latents are first corrected with what the model said there."""
        data = latents - self.sigmas[index] * velocity
        if self._start is not None:
            latents = self._correct(index, self._start, data)
        self._order = self._order_of(index)
        self._data = [*self._data[-1:], data]
        self._start = latents
        return self._predict(index, latents)

    def _order_of(self, index: int) -> int:
        return min(2, len(self) - index, index + 1)

    def state(self) -> dict[str, Tensor]:
        """See `Solver.state`."""
        data = {f"data{place}": each for place, each in enumerate(self._data)}
        return data if self._start is None else data | {"start": self._start}

    def go_on(self, num_done: int, state: dict[str, Tensor]) -> None:
        """See `Solver.go_on`."""
        self._data = [state[key] for key in sorted(state) if key.startswith("data")]
        self._start = state.get("start")
        self._order = self._order_of(num_done - 1)

    def _coefficients(self, index: int) -> tuple[float, float, float, float]:
        """Return h and the weights of x and of the data prediction, and α B(h), for the step from index to index + 1."""
        sigma, target = self.sigmas[index], self.sigmas[index + 1]
        h = _log_snr(target) - _log_snr(sigma)
        alpha_b = (1 - target) * math.expm1(-h)
        return h, target / sigma, -alpha_b, alpha_b

    def _predict(self, index: int, latents: Tensor) -> Tensor:
        h, of_x, of_data, alpha_b = self._coefficients(index)
        out = of_x * latents + of_data * self._data[-1]
        if self._order == 2:
            r = (_log_snr(self.sigmas[index - 1]) - _log_snr(self.sigmas[index])) / h
            out = out - 0.5 * alpha_b / r * (self._data[-2] - self._data[-1])
        return out

    def _correct(self, index: int, start: Tensor, data: Tensor) -> Tensor:
        """Redo the step from index - 1 to index, now that the model was evaluated at its end."""
        h, of_x, of_data, alpha_b = self._coefficients(index - 1)
        previous = self._data[-1]
        out = of_x * start + of_data * previous
        if self._order == 1:
            return out - 0.5 * alpha_b * (data - previous)
        # Solve [[1, 1], [r, 1]] ρ = b for the weights of the two differences.
        r = (_log_snr(self.sigmas[index - 2]) - _log_snr(self.sigmas[index - 1])) / h
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 0.5
        b = (phi_2 / phi_1, 2 * phi_3 / phi_1)
        rho = (b[0] - b[1]) / (1 - r)
        return out - alpha_b * (rho / r * (self._data[-2] - previous) + (b[0] - rho) * (data - previous))


SOLVERS: dict[str, type[Solver]] = {"unipc": UniPC, "dpm++": DpmSolverPlusPlus, "euler": Euler}


def make_solver(name: str, steps: int, shift: float) -> Solver:
    """Return a fresh solver for one run."""
    return SOLVERS[name](steps, shift)
