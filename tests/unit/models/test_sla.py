"""Sparse-linear attention against its authors' module, and in a transformer that was trained with it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import golden_folder
from wan_dist.models.attention import block_sparse
from wan_dist.models.attention.block_sparse import BlockSizes
from wan_dist.models.attention.sla import attend_sparse_linear, select_key_blocks


def load_golden() -> tuple[dict[str, Tensor], nn.Linear]:
    tensors = load_file(golden_folder("fewstep") / "attention.safetensors")
    projection = nn.Linear(32, 32)
    projection.weight.data, projection.bias.data = (
        tensors["sla.proj_weight"],
        tensors["sla.proj_bias"],
    )
    return tensors, projection


CASES = [(0.15, 128, 64), (0.3, 128, 64), (0.3, 64, 64)]


@pytest.mark.parametrize(("share", "query", "key"), CASES)
def test_it_is_the_authors_attention(share: float, query: int, key: int) -> None:
    tensors, projection = load_golden()
    q, k, v = (tensors[f"sla.{name}"] for name in "qkv")
    case, sizes = f"sla.top{share}.q{query}.k{key}", BlockSizes(query, key)
    selected = select_key_blocks(q, k, key_share=share, block_sizes=sizes)
    expected_map = tensors[f"{case}.map"]
    found_map = torch.zeros_like(expected_map).scatter_(-1, selected, 1)
    assert torch.equal(found_map, expected_map)
    out = attend_sparse_linear(q, k, v, projection, key_share=share, block_sizes=sizes)
    torch.testing.assert_close(out, tensors[f"{case}.out"], rtol=0, atol=1e-5)


def test_parts_of_the_queries_and_of_the_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, projection = load_golden()
    q, k, v = (tensors[f"sla.{name}"] for name in "qkv")
    monkeypatch.setattr(block_sparse, "_GATHERED_VALUES", 3 * 64 * 32)
    parts = [
        attend_sparse_linear(part, k, v, projection, key_share=0.3) for part in q.split(128, dim=1)
    ]
    expected = tensors["sla.top0.3.q128.k64.out"]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_each_query_attends_to_a_block_at_least() -> None:
    x = torch.randn(1, 130, 1, 32, generator=torch.Generator().manual_seed(1))
    selected = select_key_blocks(x, x, key_share=0.1)
    assert selected.shape == (1, 1, 2, 1)
