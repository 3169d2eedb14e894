"""Solvers by name, number of steps and shift, with noise for those that draw some."""

from wan_dist.config.sections import SampleConfig
from wan_dist.planning.noise_schedule import NoiseSchedule, make_noise_schedule
from wan_dist.sampling.noise import NoiseSource
from wan_dist.sampling.solvers import Solver, make_solver
from wan_dist.tasks.registry import TASKS


def make_schedule(name: str, steps: int, shift: float = 5.0, **settings: object) -> NoiseSchedule:
    """Return the schedule of these settings for a text-to-video task."""
    sample = SampleConfig(solver=name, steps=steps, shift=shift, **settings)  # type: ignore[arg-type]
    return make_noise_schedule(sample, shift, TASKS["t2v-14B"])


def make_plain_solver(
    name: str, steps: int, shift: float = 5.0, noise: NoiseSource | None = None, **settings: object
) -> Solver:
    """Return a solver; its noise has the shape (4, 2, 3, 3) unless it is given."""
    noise = noise or NoiseSource((4, 2, 3, 3), seed=1)
    return make_solver(name, make_schedule(name, steps, shift, **settings), noise)
