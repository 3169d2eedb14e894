"""On a GPU: SLA and VSA with kernels against the same with PyTorch in float32, and the lists alone."""

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import relative_error
from wan_dist.models.attention import block_sparse
from wan_dist.models.attention.sla import attend_sparse_linear, select_key_blocks
from wan_dist.models.attention.vsa import attend_in_tiles

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def draw_qkv(num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(0)
    qkv = torch.randn(1, num_tokens, 3, 3, width, generator=generator, device=CUDA)
    return qkv.to(dtype).unbind(2)  # as views of one tensor, as the transformer has them


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1280, 1291])
def test_sla(num_tokens: int, dtype: torch.dtype, width: int) -> None:
    q, k, v = draw_qkv(num_tokens, width, dtype)
    assert block_sparse.select_kernels(q) is not None
    torch.manual_seed(0)
    projection = nn.Linear(width, width).to(CUDA, dtype).requires_grad_(False)
    out = attend_sparse_linear(q, k, v, projection, key_share=0.3)
    # In float32 of the same lists, by PyTorch.
    selected = select_key_blocks(q, k, key_share=0.3)
    tables = [block_sparse._order_tokens(num_tokens, size, CUDA) for size in (128, 64)]
    expected = block_sparse._attend_masked(q, k, v, selected, *tables)
    projection.float()
    for head in range(q.shape[2]):
        linear = block_sparse.attend_linearly(*(x[0, :, head].float() for x in (q, k, v)))
        expected[0, :, head] += projection(linear)
    assert relative_error(out, expected) < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_sla_selects_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = draw_qkv(4000, 128, torch.bfloat16)
    selected = select_key_blocks(q, k, key_share=0.2)
    monkeypatch.setattr("wan_dist.models.attention.sla.select_kernels", lambda _: None)
    expected = select_key_blocks(q, k, key_share=0.2)
    assert (selected != expected).float().mean() < 0.02  # sums in another order decide ties


@pytest.mark.parametrize("grid", [(5, 9, 10), (4, 8, 8)])
def test_vsa(grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw_qkv(grid[0] * grid[1] * grid[2], 128, torch.float16)
    out = attend_in_tiles(q, k, v, grid, sparsity=0.0)
    monkeypatch.setattr("wan_dist.models.attention.vsa.select_kernels", lambda _: None)
    expected = attend_in_tiles(q.float(), k.float(), v.float(), grid, sparsity=0.0)
    assert relative_error(out, expected) < 2e-3


def test_flash_attention_4_is_the_kernel() -> None:
    attend = block_sparse.load_flash_attention(CUDA)
    if attend is None:
        pytest.skip("needs flash-attn-4 on Hopper")
    q, k, v = draw_qkv(3001, 128, torch.bfloat16)
    selected = select_key_blocks(q, k, key_share=0.2)
    kernels = block_sparse.select_kernels(q)
    assert kernels is not None
    sizes = block_sparse.BlockSizes(128, 64)
    expected = block_sparse.attend_to_block_lists(kernels, q, k, v, selected, sizes)
    assert relative_error(attend(q, k, v, selected), expected) < 5e-3
