"""On a GPU: the transformer's Triton kernels against the same arithmetic in PyTorch, and how far a
block is from float32 with each.
"""

import copy

import pytest
import torch
from torch import Tensor

from tests.conftest import relative_error
from wan_dist.models.attention import cross as cross_attention
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import FusedBlock
from wan_dist.models.kernels import quantized_linear as quantized
from wan_dist.models.kernels import transformer_ops as elementwise
from wan_dist.models.kernels.transformer_ops import Scaling

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LENGTH = 37


def tokens(width: int) -> Tensor:
    return torch.randn(1, LENGTH, 3 * width, device=CUDA).bfloat16()[:, :, width : 2 * width]


@pytest.mark.parametrize("width", [1536, 3072, 5120])
@pytest.mark.parametrize("segments", [(LENGTH,), (5, LENGTH - 5), (0, LENGTH), (LENGTH, 0)])
def test_kernels_are_the_arithmetic(
    width: int, segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shift, scale, gate = torch.randn(1, len(segments), 3, 1, width, device=CUDA).unbind(2)
    weight, x, y = (
        torch.rand(1, 1, 1, width, device=CUDA),
        tokens(width),
        tokens(width).contiguous(),
    )
    rotary = (torch.randn(LENGTH, 1, 64, device=CUDA), torch.randn(LENGTH, 1, 64, device=CUDA))

    def results() -> list[Tensor]:
        first, second, heads = x.clone(), x.clone(), x.clone().unflatten(2, (-1, 128))
        made = [
            elementwise.layer_norm(x, Scaling(scale, shift), segments, 1e-6, torch.empty_like(y))
        ]
        made += [
            elementwise.layer_norm(
                x, Scaling(scale, shift), segments, 1e-6, torch.empty_like(y, dtype=torch.float32)
            )
        ]
        rounded = elementwise.layer_norm(
            x, Scaling(scale, shift), segments, 1e-6, elementwise.make_output_buffer(y, as_fp8=True)
        )
        assert isinstance(rounded, elementwise.Fp8Tokens)
        made += [rounded.values.float() * rounded.scale]
        affine = Scaling(weight, weight, plus_one=False)
        made += [
            elementwise.add_gated_layer_norm_(
                first, y, gate, affine, segments, 1e-6, torch.empty_like(y)
            ),
            first,
        ]
        elementwise.add_gated_(second, y, None, segments)
        apart = torch.empty(
            2, LENGTH, 1, heads.shape[2] // 2, 128, dtype=heads.dtype, device=CUDA
        ).permute(2, 1, 0, 3, 4)
        elementwise.norm_and_rotate(heads, weight.flatten(), 1e-6, rotary, apart)
        elementwise.norm_and_rotate(heads, weight.flatten(), 1e-6, rotary, heads)
        assert torch.equal(apart.flatten(2, 3), heads)
        return [*made, second, heads]

    assert elementwise._load_kernels(CUDA, width) is not None
    found = results()
    monkeypatch.setattr(elementwise, "_select_kernels", lambda *_: None)
    for one, other in zip(found, results(), strict=True):
        assert relative_error(one, other) < 2e-3


@pytest.mark.parametrize("width", [1536, 5120, 13824])
@pytest.mark.parametrize("gelu", [False, True])
def test_tokens_are_rounded_to_fp8_as_without_kernels(width: int, gelu: bool) -> None:
    torch.manual_seed(0)
    x = tokens(width)[0]
    kernels = quantized._load_kernels(CUDA)
    assert kernels is not None
    found, found_scale = quantized._quantize_to_fp8(kernels, x, gelu=gelu)
    wanted, wanted_scale = quantized._quantize_to_fp8(None, x, gelu=gelu)
    assert relative_error(found_scale, wanted_scale) < 1e-6
    assert relative_error(found.float() * found_scale, wanted.float() * wanted_scale) < 2e-3


@pytest.mark.parametrize(("num_text", "num_image"), [(1, 0), (64, 0), (127, 257), (512, 514)])
def test_padding_that_is_counted_is_padding_that_is_there(num_text: int, num_image: int) -> None:
    torch.manual_seed(0)
    attention = InnerAttention(name="cudnn")
    q = tokens(3 * 128).unflatten(2, (3, 128))
    text, image = (
        [torch.randn(1, number, 3, 128, device=CUDA).bfloat16() for _ in range(2)]
        for number in (num_text, num_image)
    )
    kv = [*text, *(image if num_image else [])]
    found = cross_attention.cross_attend(attention, q, kv, 512)
    exact = cross_attention._run_cross_attention(
        None, attention, q.float(), [part.float() for part in kv], 512
    )
    plain = cross_attention._run_cross_attention(None, attention, q, kv, 512)
    assert cross_attention._select_kernels(attention, q) is not None
    assert relative_error(found, exact) <= min(4e-3, 1.1 * relative_error(plain, exact))


def test_a_block_is_as_near_to_float32_as_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dims = TransformerDims(num_layers=1, dim=5120, ffn_dim=13824, num_heads=40)
    exact = FusedBlock(dims, torch.float32, InnerAttention()).to(CUDA).requires_grad_(False)
    half = (
        FusedBlock(dims, torch.bfloat16, InnerAttention(name="cudnn"))
        .to(CUDA)
        .requires_grad_(False)
    )
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(
        {name: value.float() for name, value in copy.deepcopy(half).state_dict().items()}
    )
    x, time = (
        torch.randn(1, 512, 5120, device=CUDA).bfloat16(),
        torch.randn(1, 1, 6, 5120, device=CUDA),
    )
    context = [torch.randn(1, 30, 40, 128, device=CUDA).bfloat16() for _ in range(2)]
    rotary = (torch.rand(512, 1, 64, device=CUDA), torch.rand(512, 1, 64, device=CUDA))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    with torch.no_grad():
        wanted = exact(
            [x.float()], time, [tuple(part.float() for part in context)], rotary, (512,)
        )[0]
        fused = relative_error(half([x.clone()], time, [tuple(context)], rotary, (512,))[0], wanted)
        for module in (elementwise, cross_attention):
            monkeypatch.setattr(module, "_select_kernels", lambda *_: None)
        plain = relative_error(half([x.clone()], time, [tuple(context)], rotary, (512,))[0], wanted)
    print(f"from float32: with kernels {fused:.2e}, without {plain:.2e}")
    assert fused < 1.1 * plain
