"""Linears in 8 and 4 bits: how far they are from full ones, and that loading and streaming fill them alike."""

import pytest
import torch
from torch import nn

from tests.conftest import FIXTURES, relative_error
from wan_dist import footprint
from wan_dist.catalog import TASKS
from wan_dist.models.quantized import GROUP, QuantizedLinear, quantize, quantize_blocks
from wan_dist.models.transformer import WanTransformer
from wan_dist.streaming import Streaming
from wan_dist.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
# Relative error of a product with weights from a normal distribution: of rounding to 3, 7 and 4 bits.
ERRORS = {"fp8": 0.03, "int8": 0.01, "int4": 0.11}


@pytest.mark.parametrize("kind", ERRORS)
def test_distance_from_full_weights(kind: str) -> None:
    torch.manual_seed(0)
    full = nn.Linear(256, 100)
    linear = QuantizedLinear(256, 100, kind, torch.float32)
    nn.init.normal_(full.weight)
    linear.load_state_dict(quantize(full.weight.data, kind) | {"bias": full.bias.data})
    x = torch.randn(7, 3, 256)
    error = relative_error(linear(x), full(x))
    assert ERRORS[kind] / 5 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", ERRORS)
def test_what_has_few_values_is_exact(kind: str) -> None:
    weight = torch.randint(-1, 2, (5, 2 * GROUP)).float()
    weight[:, ::GROUP], weight[:, 1::GROUP] = 1, -1
    linear = QuantizedLinear(2 * GROUP, 5, kind, torch.float32)
    linear.load_state_dict(quantize(weight, kind) | {"bias": torch.zeros(5)})
    torch.testing.assert_close(linear.dequantized(torch.float32), weight, rtol=0, atol=1e-6 if kind != "int4" else 7e-2)


@pytest.mark.parametrize("kind", ERRORS)
def test_loaded_and_streamed_are_quantised_alike(kind: str) -> None:
    component = open_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32).transformers[0]

    def spread(model: WanTransformer) -> None:
        quantize_blocks(model.blocks, kind)

    resident = component.load(CPU, spread=spread)
    kinds = [isinstance(block.get_submodule("ffn.0"), QuantizedLinear) for block in resident.blocks]
    assert kinds == [False, True, False]
    streamed = component.load(CPU, spread=spread, streaming=Streaming("blocks"))
    x = torch.randn(1, 5, component.dims.dim)
    for block, other in zip(resident.blocks, streamed.blocks, strict=True):
        outputs = []
        for each in (block, other):
            each.forward = lambda x, each=each: each.ffn(each.self_attn.qkv(x)[..., : component.dims.dim])  # type: ignore[method-assign]
            outputs.append(each(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B"])
def test_planned_bytes_are_exact(kind: str, task: str) -> None:
    dims = TASKS[task].transformer
    with torch.device("meta"):
        model = WanTransformer(dims, torch.bfloat16)
        quantize_blocks(model.blocks, kind)
    assert footprint.transformer_bytes(dims, 2, kind) == sum(parameter.nbytes for parameter in model.parameters())
