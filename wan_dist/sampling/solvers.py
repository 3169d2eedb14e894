"""Flow-matching solvers with the shifted schedules of the reference implementation.

x_σ = (1 - σ) x₀ + σ ε and the model predicts the velocity v = ε - x₀, so x₀ = x - σ v. With α = 1 - σ and
λ = log α - log σ. Coefficients are computed in float64 from float32 sigmas; latents stay in their own dtype.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""Noise levels that the models are trained on."""


def compute_shifted_sigmas(num_steps: int, shift: float, *, largest_sigma: float) -> list[float]:
    """Return ``num_steps`` decreasing noise levels and a final 0.

    They are s σ / (1 + (s - 1) σ), s being the shift and σ evenly spaced from ``largest_sigma`` to 0.
    """
    sigmas = np.linspace(largest_sigma, 0, num_steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return [*sigmas.tolist(), 0.0]


def _compute_half_log_snr(sigma: float) -> float:
    """Return half the log signal-to-noise ratio, λ; infinite at both ends."""
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log1p(-sigma) - math.log(sigma)


class Solver(ABC):
    """Solver of the flow ODE, from noise to data along a fixed schedule.

    ``timesteps`` are the model's inputs: 1000 σ truncated to an integer, as in the reference. ``sigmas``
    has one entry more, the final 0.
    """

    largest_sigma = 1.0

    def __init__(self, num_steps: int, shift: float) -> None:
        exact_sigmas = compute_shifted_sigmas(num_steps, shift, largest_sigma=self.largest_sigma)
        self.timesteps = [int(sigma * NUM_TRAIN_TIMESTEPS) for sigma in exact_sigmas[:-1]]
        self.sigmas = np.asarray(exact_sigmas, dtype=np.float32).tolist()

    def __len__(self) -> int:
        return len(self.timesteps)

    @abstractmethod
    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Return the latents at ``sigmas[index + 1]``, from latents and velocity at ``sigmas[index]``.

        Indices must come in order from 0: multistep solvers remember earlier steps.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the state of earlier steps, from which `restore` resumes."""
        return {}

    # Not abstract: solvers of one step have no state.
    def restore(self, num_done: int, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore the state of a solver of the same schedule after ``num_done`` steps."""


class Euler(Solver):
    """Euler's method, first order: x += (σ' - σ) v."""

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`."""
        return latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


class DpmSolverPlusPlus(Solver):
    """DPM-Solver++(2M), midpoint (arXiv:2211.01095, algorithm 2); first and last step are of first order."""

    def __init__(self, num_steps: int, shift: float) -> None:
        super().__init__(num_steps, shift)
        self._previous_x0: Tensor | None = None

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`."""
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        x0 = latents - sigma * velocity
        h = _compute_half_log_snr(next_sigma) - _compute_half_log_snr(sigma)
        direction = x0
        if self._previous_x0 is not None and index < len(self) - 1:
            ratio = (
                _compute_half_log_snr(sigma) - _compute_half_log_snr(self.sigmas[index - 1])
            ) / h
            direction = x0 + 0.5 / ratio * (x0 - self._previous_x0)
        self._previous_x0 = x0
        return next_sigma / sigma * latents - (1 - next_sigma) * math.expm1(-h) * direction

    def state(self) -> dict[str, Tensor]:
        """See `Solver.state`."""
        return {} if self._previous_x0 is None else {"previous": self._previous_x0}

    def restore(self, num_done: int, state: dict[str, Tensor]) -> None:
        """See `Solver.restore`."""
        self._previous_x0 = state.get("previous")


class UniPC(Solver):
    """UniPC of order 2 in data prediction with B(h) = e^h - 1 (arXiv:2302.04867, algorithms 5 and 8)."""

    # The reference starts from the largest sigma of its float32 training schedule, not from 1.
    largest_sigma = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))

    def __init__(self, num_steps: int, shift: float) -> None:
        super().__init__(num_steps, shift)
        self._x0_history: list[Tensor] = []
        self._start_latents: Tensor | None = None  # from which the last prediction started
        self._order = 1

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`; the latents are first corrected with the velocity that was evaluated at them."""
        x0 = latents - self.sigmas[index] * velocity
        if self._start_latents is not None:
            latents = self._correct_latents(index, self._start_latents, x0)
        self._order = self._compute_order(index)
        self._x0_history = [*self._x0_history[-1:], x0]
        self._start_latents = latents
        return self._predict_latents(index, latents)

    def _compute_order(self, index: int) -> int:
        return min(2, len(self) - index, index + 1)

    def state(self) -> dict[str, Tensor]:
        """See `Solver.state`."""
        entries = {f"data{index}": x0 for index, x0 in enumerate(self._x0_history)}
        return entries if self._start_latents is None else entries | {"start": self._start_latents}

    def restore(self, num_done: int, state: dict[str, Tensor]) -> None:
        """See `Solver.restore`."""
        self._x0_history = [state[key] for key in sorted(state) if key.startswith("data")]
        self._start_latents = state.get("start")
        self._order = self._compute_order(num_done - 1)

    def _compute_coefficients(self, index: int) -> tuple[float, float, float, float]:
        """Return h, the weights of x and of the data prediction, and α B(h), for step ``index``."""
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        h = _compute_half_log_snr(next_sigma) - _compute_half_log_snr(sigma)
        alpha_b = (1 - next_sigma) * math.expm1(-h)
        return h, next_sigma / sigma, -alpha_b, alpha_b

    def _predict_latents(self, index: int, latents: Tensor) -> Tensor:
        h, x_weight, x0_weight, alpha_b = self._compute_coefficients(index)
        next_latents = x_weight * latents + x0_weight * self._x0_history[-1]
        if self._order == 2:
            r = (
                _compute_half_log_snr(self.sigmas[index - 1])
                - _compute_half_log_snr(self.sigmas[index])
            ) / h
            next_latents = next_latents - 0.5 * alpha_b / r * (
                self._x0_history[-2] - self._x0_history[-1]
            )
        return next_latents

    def _correct_latents(self, index: int, start_latents: Tensor, x0: Tensor) -> Tensor:
        """Redo the step from index - 1 to index, now that the model was evaluated at its end."""
        h, x_weight, x0_weight, alpha_b = self._compute_coefficients(index - 1)
        previous_x0 = self._x0_history[-1]
        corrected_latents = x_weight * start_latents + x0_weight * previous_x0
        if self._order == 1:
            return corrected_latents - 0.5 * alpha_b * (x0 - previous_x0)
        # Solve [[1, 1], [r, 1]] ρ = b for the weights of the two differences.
        r = (
            _compute_half_log_snr(self.sigmas[index - 2])
            - _compute_half_log_snr(self.sigmas[index - 1])
        ) / h
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 0.5
        b = (phi_2 / phi_1, 2 * phi_3 / phi_1)
        rho = (b[0] - b[1]) / (1 - r)
        return corrected_latents - alpha_b * (
            rho / r * (self._x0_history[-2] - previous_x0) + (b[0] - rho) * (x0 - previous_x0)
        )


SOLVERS: dict[str, type[Solver]] = {"unipc": UniPC, "dpm++": DpmSolverPlusPlus, "euler": Euler}


def make_solver(name: str, num_steps: int, shift: float) -> Solver:
    """Return a fresh solver for one run."""
    return SOLVERS[name](num_steps, shift)
