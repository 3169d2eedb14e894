"""Flow-matching solvers: those of the reference implementation, and those of few-step models.

x_σ = (1 - σ) x₀ + σ ε and the model predicts the velocity v = ε - x₀, so x₀ = x - σ v. With α = 1 - σ and
λ = log α - log σ. Coefficients are computed in float64 from float32 sigmas; latents stay in their own dtype.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from wan_dist.planning.noise_schedule import NoiseSchedule
from wan_dist.sampling.noise import NoiseSource


def _compute_half_log_snr(sigma: float) -> float:
    """Return half the log signal-to-noise ratio, λ; infinite at both ends."""
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log1p(-sigma) - math.log(sigma)


class Solver(ABC):
    """Solver from noise to data along a fixed schedule.

    ``timesteps`` are the model's inputs. ``sigmas`` has one entry more, the final 0. ``noise`` has given the
    initial noise, and gives more to solvers that add noise between steps.
    """

    starts_below_noise = False
    """Whether initial latents are the noise times the first σ, which is less than 1."""

    def __init__(self, schedule: NoiseSchedule, noise: NoiseSource) -> None:
        self.timesteps, self.sigmas = schedule.timesteps, schedule.sigmas
        self.noise = noise

    def scale_initial_noise(self, noise: Tensor) -> Tensor:
        """Return the initial latents, from standard normal noise."""
        return noise * self.sigmas[0] if self.starts_below_noise else noise

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


class Renoising(Solver):
    """x₀ by one prediction, and new noise on it: how DMD and consistency models are sampled (LCM's sampler).

    x = (1 - σ') (x - σ v) + σ' n (arXiv:2303.01469, algorithm 1; arXiv:2405.14867).
    """

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """See `Solver.step`."""
        next_sigma = self.sigmas[index + 1]
        x0 = latents - self.sigmas[index] * velocity
        return x0 if next_sigma == 0 else (1 - next_sigma) * x0 + next_sigma * self.noise.draw()

    def restore(self, num_done: int, state: dict[str, Tensor]) -> None:
        """See `Solver.restore`; the noise of the steps that are done is drawn again."""
        self.noise.skip(num_done)


class Rcm(Renoising):
    """rCM's sampler (arXiv:2510.08431): `Renoising` that starts at less than noise alone."""

    starts_below_noise = True


class RcmOde(Euler):
    """rCM's sampler without new noise: sharper, and less robust to errors of the model."""

    starts_below_noise = True


class DpmSolverPlusPlus(Solver):
    """DPM-Solver++(2M), midpoint (arXiv:2211.01095, algorithm 2); first and last step are of first order."""

    def __init__(self, schedule: NoiseSchedule, noise: NoiseSource) -> None:
        super().__init__(schedule, noise)
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

    def __init__(self, schedule: NoiseSchedule, noise: NoiseSource) -> None:
        super().__init__(schedule, noise)
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


SOLVERS: dict[str, type[Solver]] = {
    "unipc": UniPC,
    "dpm++": DpmSolverPlusPlus,
    "euler": Euler,
    "fun_euler": Euler,
    "lcm": Renoising,
    "rcm": Rcm,
    "rcm_ode": RcmOde,
}


def make_solver(name: str, schedule: NoiseSchedule, noise: NoiseSource) -> Solver:
    """Return a fresh solver for one run."""
    return SOLVERS[name](schedule, noise)
