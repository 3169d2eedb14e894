"""Samplers of few-step models, against trajectories that their own code made with a made-up model."""

import math
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import FIXTURES
from wan_dist.config.sections import SampleConfig
from wan_dist.planning.noise_schedule import make_noise_schedule, round_timestep
from wan_dist.runtime.errors import InputError
from wan_dist.sampling.noise import NoiseSource
from wan_dist.sampling.solvers import Solver, make_solver
from wan_dist.tasks.registry import TASKS

GOLDEN = load_file(FIXTURES / "components/few_step_samplers.safetensors")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN if key.endswith(".trajectory")})
SHAPE = (1, 1, 2, 3, 4)


class StoredNoise(NoiseSource):
    """The draws that a golden used, in their order."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = list(draws)

    def draw(self) -> Tensor:
        return self.draws.pop(0).view(SHAPE)


def read_sample(case: str) -> tuple[SampleConfig, str]:
    """Return the settings that a case's name says, and the dtype of what the model is given."""
    family, kind, *parts = case.split(".")
    words = {
        match[1]: match[2] for part in parts if (match := re.fullmatch(r"([a-z]+)(\d+)", part))
    }
    dtype = parts[-1] if parts[-1].startswith(("float", "bfloat")) else "float32"
    settings: dict[str, Any] = {"steps": int(words["steps"])}
    if family == "rcm":
        settings |= {
            "solver": "rcm" if kind == "sde" else "rcm_ode",
            "sigma_max": float(words["sigma"]),
            "timesteps": {"float32": "float", "bfloat16": None}.get(
                dtype, GOLDEN[f"{case}.timesteps"].tolist()
            ),
        }
    elif family in ("fastwan", "causvid"):
        sigmas, timesteps = GOLDEN[f"{case}.sigmas"].tolist(), GOLDEN[f"{case}.timesteps"].tolist()
        settings |= {"solver": "lcm", "sigmas": sigmas, "timesteps": timesteps}
    elif family == "selfforcing" or kind == "lcm":
        settings |= {"solver": "lcm", "shift": float(words["shift"])}
    else:
        settings |= {"solver": "euler", "shift": float(words["shift"]), "timesteps": "float"}
    return SampleConfig(**settings), dtype


def run_solver(solver: Solver, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the latents after each step of the golden's made-up model, (n, 24)."""
    trajectory = []
    for index, timestep in enumerate(solver.timesteps):
        x = latents.to(dtype)
        velocity = 0.8 * torch.sin(1.7 * x) + 0.3 * math.cos(3 * timestep / 1000) * x
        latents = solver.step(index, latents, velocity.to(latents.dtype))
        trajectory.append(latents.flatten())
    return torch.stack(trajectory)


@pytest.mark.parametrize("case", CASES)
def test_a_sampler_follows_its_own_code(case: str) -> None:
    sample, dtype_name = read_sample(case)
    schedule = make_noise_schedule(sample, sample.shift or 5.0, TASKS["t2v-14B"])
    expected = GOLDEN[f"{case}.trajectory"]
    solver = make_solver(
        sample.solver, schedule, StoredNoise(GOLDEN.get(f"{case}.noise", torch.empty(0)))
    )
    is_exact = case.startswith("rcm") or dtype_name == "float64"
    start = torch.linspace(-2, 2, 24).to(torch.float64 if is_exact else torch.float32)
    latents = solver.scale_initial_noise(start.view(SHAPE))
    dtype = getattr(torch, dtype_name)
    trajectory = run_solver(solver, latents, dtype)
    assert list(solver.timesteps) == pytest.approx(GOLDEN[f"{case}.timesteps"].tolist(), abs=1e-4)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}[dtype_name]
    torch.testing.assert_close(trajectory, expected.to(trajectory.dtype), rtol=0, atol=tolerance)


def test_all_cases_are_here() -> None:
    assert len(CASES) == 54


def test_rounding_to_bfloat16_is_torchs() -> None:
    for number in range(1, 1001):
        sigma = number / 1000
        expected = torch.tensor(sigma, dtype=torch.float32).mul(1000).bfloat16().item()
        assert round_timestep(sigma, "bfloat16") == expected


def test_noise_between_steps_continues_the_generator() -> None:
    """LightX2V draws it from the generator that made the initial noise; FastWan with frames first."""
    shape = (4, 3, 2, 2)
    generator = torch.Generator().manual_seed(7)
    expected = [torch.randn(1, *shape, generator=generator) for _ in range(3)]
    source, resumed = NoiseSource(shape, seed=7), NoiseSource(shape, seed=7)
    assert all(torch.equal(source.draw(), noise) for noise in expected)
    resumed.skip(2)
    assert torch.equal(resumed.draw(), expected[2])
    generator = torch.Generator().manual_seed(7)
    frames = [torch.randn(1, 3, 4, 2, 2, generator=generator) for _ in range(2)]
    source = NoiseSource(shape, seed=7, frames_first=True)
    assert all(torch.equal(source.draw(), noise.transpose(1, 2)) for noise in frames)


def test_rcm_starts_where_it_was_trained() -> None:
    sigma_max = {
        name: make_noise_schedule(SampleConfig(solver="rcm", steps=4), 5.0, TASKS[name]).sigmas[0]
        for name in ("t2v-14B", "i2v-14B", "t2v-A14B", "i2v-A14B")
    }
    assert sigma_max == {
        "t2v-14B": 80 / 81,
        "i2v-14B": 80 / 81,
        "t2v-A14B": 80 / 81,
        "i2v-A14B": 200 / 201,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rcm", "steps": 5}, r"sample.steps=5 must be at most 4 with rCM's schedule"),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000]}, "sample.timesteps has 1 numbers for 2 steps"),
        ({"sigmas": [0.5, 1.0]}, r"sample.sigmas=\[0.5, 1.0\] is not a list of noise levels"),
        ({"sigmas": []}, "sample.sigmas="),
        ({"sigmas": "1,0.5"}, "sample.sigmas=1,0.5"),
        ({"sigmas": [1.0, 0.0]}, "stay above 0"),
        ({"timesteps": "rounded"}, "sample.timesteps=rounded is neither integer, float, bfloat16"),
        ({"timesteps": [1000, 1000]}, "sample.timesteps="),
        ({"sigma_max": -1.0}, "sample.sigma_max"),
    ],
)
def test_what_makes_no_schedule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_noise_schedule(SampleConfig(**settings), 5.0, TASKS["t2v-14B"])
