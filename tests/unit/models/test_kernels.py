"""Kernels are used only where they work and do right."""

import sys
from pathlib import Path
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


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "no C compiler found: install gcc, or set CC=..."),
        ("nocc -O2", "no C compiler found at CC=nocc: install it, or unset CC"),
        (sys.executable, "division by zero"),
    ],
)
def test_a_missing_compiler_is_said(
    compiler: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", compiler)
    fake = ModuleType("fake_kernels")
    fake.ones = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wan_dist.models.kernels.fake_kernels", fake)
    with caplog.at_level("WARNING", logger="wan_dist"):
        assert load_verified_kernels("fake_kernels", trial) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"using PyTorch, which is slower: {words}")


def test_kernels_that_are_not_there_are_not_missed() -> None:
    assert load_verified_kernels("no_kernels", trial) is None
