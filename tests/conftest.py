import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"
SHARED_GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"


def has_golden(name: str) -> bool:
    return (FIXTURES / name).exists() or (SHARED_GOLDENS / name).exists()


def golden_folder(name: str) -> Path:
    """Return a golden checkpoint's folder: the one that travels with the code, or one of the larger
    set beside the checkout.
    """
    if not has_golden(name):
        pytest.skip(f"the golden {name} is not beside this checkout")
    here = FIXTURES / name
    return here if here.exists() else SHARED_GOLDENS / name


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double().cpu(), reference.double().cpu()
    return ((value - reference).norm() / reference.norm()).item()
