import math

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES
from tests.sampling import make_plain_solver

GOLDEN = load_file(FIXTURES / "components/solvers.safetensors")
SCHEDULES = sorted({key.rpartition(".")[0] for key in GOLDEN})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_solver_follows_the_reference(schedule: str) -> None:
    name, steps, shift = schedule.split(".")
    solver = make_plain_solver(
        name, int(steps.removeprefix("steps")), float(shift.removeprefix("shift"))
    )
    x = torch.linspace(-2, 2, 24).view(1, 1, 2, 3, 4)
    trajectory = []
    for index, timestep in enumerate(solver.timesteps):
        velocity = 0.8 * torch.sin(1.7 * x) + 0.3 * math.cos(3 * timestep / 1000) * x
        x = solver.step(index, x, velocity)
        trajectory.append(x.flatten())
    assert list(solver.timesteps) == GOLDEN[f"{schedule}.timesteps"].tolist()
    torch.testing.assert_close(
        torch.tensor(solver.sigmas), GOLDEN[f"{schedule}.sigmas"], rtol=0, atol=0
    )
    expected = GOLDEN[f"{schedule}.trajectory"].view(len(solver), -1)
    torch.testing.assert_close(torch.stack(trajectory), expected, rtol=0, atol=1e-5)


def test_all_sixty_schedules_are_here() -> None:
    assert len(SCHEDULES) == 60


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_a_straight_path_is_solved_exactly(name: str) -> None:
    """If the data is one point, v = (x - x0) / σ everywhere and every step must land on the line to it."""
    solver = make_plain_solver(name, 7, 5.0)
    data, noise = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    x = (1 - solver.sigmas[0]) * data + solver.sigmas[0] * noise
    for index in range(len(solver)):
        x = solver.step(index, x, (x - data) / solver.sigmas[index])
        torch.testing.assert_close(
            x, (1 - solver.sigmas[index + 1]) * data + solver.sigmas[index + 1] * noise
        )


def test_order_of_convergence() -> None:
    """On a smooth problem, four times the steps shrink a first-order error 4 times and a
    second-order one up to 16 times.
    """

    def solve(name: str, steps: int) -> torch.Tensor:
        solver = make_plain_solver(name, steps, 1.0)
        x = torch.linspace(-1, 1, 9, dtype=torch.float64)
        for index in range(len(solver)):
            x = solver.step(index, x, torch.sin(2 * x) + solver.sigmas[index])
        return x

    for name, least in (("euler", 3.9), ("dpm++", 7.0), ("unipc", 7.0)):
        exact = solve(name, 1000)  # by the same solver: UniPC starts a little later than the others
        coarse, fine = ((solve(name, steps) - exact).abs().max().item() for steps in (20, 80))
        print(name, coarse / fine)
        assert coarse / fine > least, name
