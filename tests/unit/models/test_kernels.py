"""Kernels are used only where they work and do right."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wan_dist.models.kernels.dispatch import load_verified_kernels


def trial(kernels: ModuleType | None) -> Tensor:
    return torch.ones(3) if kernels is None else kernels.ones()


@pytest.mark.parametrize(
    ("ones", "words"),
    [
        (lambda: torch.ones(3) + 1e-3, None),
        (lambda: torch.zeros(3), "fake_kernels are off by 1.0e+00 here"),
        (lambda: torch.full((3,), float("nan")), "fake_kernels are off by nan here"),
        (
            lambda: 1 / 0,
            "fake_kernels do not work here; using PyTorch, which is slower: division by zero",
        ),
    ],
)
def test_kernels_are_tried_first(
    ones: object,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = ModuleType("fake_kernels")
    fake.ones = ones  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wan_dist.models.kernels.fake_kernels", fake)
    with caplog.at_level("WARNING", logger="wan_dist"):
        found = load_verified_kernels("fake_kernels", trial)
    assert (found is fake) == (words is None)
    assert words is None or words in caplog.text


def test_kernels_that_are_not_there_are_not_missed() -> None:
    assert load_verified_kernels("no_kernels", trial) is None
