"""Video sparse attention against its authors' kernel."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import golden_folder
from wan_dist.models.attention.vsa import attend_in_tiles, count_selected_tiles


@pytest.mark.parametrize("sparsity", [0.8, 0.0])
def test_it_is_the_authors_attention(sparsity: float) -> None:
    tensors = load_file(golden_folder("fewstep") / "attention.safetensors")
    q, k, v, gate = (tensors[f"vsa.{name}"] for name in ("q", "k", "v", "gate"))
    t, h, w = tensors["vsa.grid"].tolist()
    out = attend_in_tiles(q, k, v, (t, h, w), sparsity=sparsity)
    sparse, coarse = out.chunk(2, dim=-1)
    expected = tensors[f"vsa.sparsity{sparsity}.out"]
    torch.testing.assert_close(sparse + gate * coarse, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tiles", "sparsity", "expected"),
    [(624, 0.8, 125), (1440, 0.9, 144), (12, 0.0, 12), (5, 0.99, 1)],
)
def test_the_number_of_tiles(num_tiles: int, sparsity: float, expected: int) -> None:
    assert count_selected_tiles(num_tiles, sparsity) == expected
