"""Guessed steps: how many, and how far the result is from that of all steps."""

import torch
from torch import Tensor

from tests.conftest import relative_error
from tests.sampling import make_plain_solver
from wan_dist.sampling.denoise import denoise_latents
from wan_dist.sampling.step_cache import EasyCache, TeaCache
from wan_dist.tasks.base import TeaCacheFit


def flow(latents: Tensor, timestep: int) -> Tensor:
    """Return the velocity of a straight path to a point, with some curvature."""
    target = torch.linspace(-1, 1, latents.numel()).view_as(latents)
    return (latents - target) / max(timestep / 1000, 0.02) + 0.05 * torch.sin(3 * latents)


def denoised(threshold: float, **options: object) -> tuple[Tensor, list[int], int]:
    """Return the result of 40 steps, the steps that were computed and the number of those guessed."""
    solver, computed, guesses = make_plain_solver("euler", 40, 3.0), [], []

    def predict(latents: Tensor, timestep: int) -> Tensor:
        computed.append(solver.timesteps.index(timestep))
        return flow(latents, timestep)

    cache = EasyCache(
        predict, num_steps=40, threshold=threshold, on_guess=lambda: guesses.append(1), **options
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    return denoise_latents(cache, torch.randn(1, 4, 2, 3, 3), solver), computed, len(guesses)


def test_guessed_steps_are_near_the_computed() -> None:
    exact, every, none = denoised(1e-9)
    assert every == list(range(40))
    assert none == 0
    errors = []
    for threshold in (0.02, 0.05, 0.2):
        result, computed, guessed = denoised(threshold)
        assert computed[:8] == list(range(8))
        assert computed[-1] == 39
        assert guessed == 40 - len(computed)
        errors.append(relative_error(result, exact))
        print(threshold, guessed, errors[-1])
    assert guessed > 20
    assert errors == sorted(errors)
    assert errors[1] < 0.05


def test_ranks_decide_together() -> None:
    asked: list[bool] = []

    def refuse(decision: bool) -> bool:
        asked.append(decision)
        return False

    _, computed, guessed = denoised(10.0, agree=refuse)
    assert asked == [True] * 31
    assert (len(computed), guessed) == (40, 0)


def test_tea_sums_the_foreseen_change() -> None:
    """Embeddings that grow by a tenth each step, and a fit that makes 0.21 of 0.1: the change
    passes 0.5 at every third step.
    """
    guesses: list[int] = []
    tea = TeaCache(
        TeaCacheFit((1.0, 2.0, 0.0), 0.5), num_warmup_steps=3, on_guess=lambda: guesses.append(1)
    )
    decisions = []
    for step in range(12):
        tea.start_step()
        embedding = torch.full((1, 1, 6, 4), 1.1**step)
        decisions.append(tea(embedding))
        assert tea(embedding) == decisions[-1]  # asked again for the other branch
    assert decisions == [False] * 3 + [True, True, False] * 3
    assert len(guesses) == 6
