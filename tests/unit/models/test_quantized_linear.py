"""Linears in 8 and 4 bits: how far they are from full ones, and that loading and streaming fill
them alike.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import FIXTURES, relative_error
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.kernels import quantized_linear as quantized
from wan_dist.models.kernels.quantized_linear import (
    INT4_GROUP_SIZE,
    QuantizedLinear,
    quantize_blocks,
    quantize_rows,
)
from wan_dist.planning import parameter_bytes
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.streaming import StreamingOptions

CPU = torch.device("cpu")
# Relative error of a product with weights from a normal distribution: of rounding to 3, 7 and 4 bits.
ERRORS = {"fp8": 0.03, "int8": 0.01, "int4": 0.11}


@pytest.mark.parametrize("kind", ERRORS)
def test_distance_from_full_weights(kind: str) -> None:
    torch.manual_seed(0)
    full = nn.Linear(256, 100)
    linear = QuantizedLinear(256, 100, kind, torch.float32)
    nn.init.normal_(full.weight)
    linear.load_state_dict(quantize_rows(full.weight.data, kind) | {"bias": full.bias.data})
    x = torch.randn(7, 3, 256)
    error = relative_error(linear(x), full(x))
    assert ERRORS[kind] / 5 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", ERRORS)
def test_what_has_few_values_is_exact(kind: str) -> None:
    weight = torch.randint(-1, 2, (5, 2 * INT4_GROUP_SIZE)).float()
    weight[:, ::INT4_GROUP_SIZE], weight[:, 1::INT4_GROUP_SIZE] = 1, -1
    linear = QuantizedLinear(2 * INT4_GROUP_SIZE, 5, kind, torch.float32)
    linear.load_state_dict(quantize_rows(weight, kind) | {"bias": torch.zeros(5)})
    torch.testing.assert_close(
        linear.dequantize_rows(torch.float32), weight, rtol=0, atol=1e-6 if kind != "int4" else 7e-2
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_loaded_and_streamed_are_quantised_alike(kind: str) -> None:
    component = open_checkpoint(
        FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32
    ).transformers[0]

    def spread(model: FusedTransformer) -> None:
        quantize_blocks(model.layers().values(), kind)

    resident = component.load(CPU, prepare_model=spread)
    kinds = [isinstance(block.get_submodule("ffn.0"), QuantizedLinear) for block in resident.blocks]
    assert kinds == [False, True, False]
    streamed = component.load(
        CPU, prepare_model=spread, streaming=StreamingOptions(FusedTransformer.layers)
    )
    x = torch.randn(1, 5, component.dims.dim)
    for block, other in zip(resident.blocks, streamed.blocks, strict=True):
        outputs = []
        for each in (block, other):
            each.forward = lambda x, each=each: each.ffn(
                each.self_attn.qkv(x)[..., : component.dims.dim]
            )  # type: ignore[method-assign]
            outputs.append(each(x))
        assert torch.equal(*outputs)


def test_tokens_rounded_for_fp8_products_give_about_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms that round, products of fp8 by fp8 and several of the same tokens, against products of
    what was rounded back.
    """
    torch.manual_seed(0)
    dims = TransformerDims(num_layers=3, dim=128, ffn_dim=256, num_heads=2, text_dim=32)
    model = FusedTransformer(dims, torch.bfloat16).requires_grad_(False)
    quantize_blocks(model.layers().values(), "fp8")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float8_e4m3fn:
            parameter.normal_(std=0.3)
        elif parameter.dim() > 1:
            owner = model.get_submodule(name.rpartition(".")[0])
            for part, value in quantize_rows(
                torch.randn(parameter.shape) * parameter.shape[1] ** -0.5, "fp8"
            ).items():
                getattr(owner, part).data = value
    latents, heads = torch.randn(1, 16, 2, 4, 6), (2, 64)
    contexts = [ContextKV(torch.randn(3, 2, 1, number, *heads).bfloat16()) for number in (5, 9)]
    rotary = model.compute_rotary(latents)

    def velocities() -> torch.Tensor:
        return torch.cat(model(latents, torch.tensor([[500]]), contexts, rotary))

    dequantised = velocities()
    assert not model.blocks[1].self_attn.qkv.accepts_fp8_tokens
    monkeypatch.setattr(quantized, "supports_fp8_matmul", lambda device: True)
    assert model.blocks[1].self_attn.qkv.accepts_fp8_tokens
    whole = velocities()
    model.set_slice_tokens(4)
    assert relative_error(velocities(), whole) < 1e-2
    assert 1e-4 < relative_error(whole, dequantised) < 0.1


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B"])
def test_planned_bytes_are_exact(kind: str, task: str) -> None:
    dims = TASKS[task].transformer_dims
    with torch.device("meta"):
        model = FusedTransformer(dims, torch.bfloat16)
        quantize_blocks(model.layers().values(), kind)
    assert parameter_bytes.count_transformer_bytes(dims, 2, kind) == sum(
        parameter.nbytes for parameter in model.parameters()
    )


def fp8_file(
    path: Path, spelling: str, prefix: str, kind: torch.dtype = torch.float8_e4m3fn
) -> dict[str, torch.Tensor]:
    """Write the fixture's transformer as it is passed around in fp8, one scale a tensor; returns
    the blocks' linears it stands for.
    """
    stored, meant = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=kind)}, {}
    for name, value in load_file(
        FIXTURES / "wan2.1-t2v/diffusion_pytorch_model.safetensors"
    ).items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.dim() == 2:
            scale = value.abs().amax() / torch.finfo(kind).max
            stored[prefix + name] = (value / scale).to(kind)
            stored[f"{prefix}{name.removesuffix('weight')}{spelling}"] = scale
            meant[name] = stored[prefix + name].float() * scale
        else:
            stored[prefix + name] = value
    save_file(stored, path) if path.suffix == ".safetensors" else torch.save(stored, path)
    return meant


@pytest.mark.parametrize(
    ("spelling", "prefix"), [("scale_weight", "model.diffusion_model."), ("weight_scale", "")]
)
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_files_in_fp8_load_as_they_are(
    spelling: str, prefix: str, quant: str, tmp_path: Path
) -> None:
    meant = fp8_file(tmp_path / "fp8.safetensors", spelling, prefix)
    files = [tmp_path / "fp8.safetensors"]
    component = open_checkpoint(
        FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32, given_files={"dit_file": files}
    ).transformers[0]
    model = component.load(
        CPU,
        prepare_model=None
        if quant == "none"
        else lambda model: quantize_blocks(model.layers().values(), quant),
    )
    for number, block in enumerate(model.blocks):
        for name, parts in {
            "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
            "ffn.2": ("ffn.2",),
        }.items():
            linear = block.get_submodule(name)
            assert isinstance(linear, QuantizedLinear) == (quant == "fp8" and number == 1)
            weight = (
                linear.dequantize_rows(torch.float32)
                if isinstance(linear, QuantizedLinear)
                else linear.weight
            )
            assert torch.equal(
                weight, torch.cat([meant[f"blocks.{number}.{part}.weight"] for part in parts])
            )


@pytest.mark.parametrize("file", ["e5m2.safetensors", "e5m2.pth", "e4m3.pth"])
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_scales_are_those_of_every_8_bit_float(file: str, quant: str, tmp_path: Path) -> None:
    """Without its scale a weight is noise; e5m2 has no bits to take over, and is quantised anew."""
    meant = fp8_file(
        tmp_path / file,
        "scale_weight",
        "",
        torch.float8_e5m2 if "e5m2" in file else torch.float8_e4m3fn,
    )
    files = [tmp_path / file]
    component = open_checkpoint(
        FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32, given_files={"dit_file": files}
    ).transformers[0]
    model = component.load(
        CPU,
        prepare_model=None
        if quant == "none"
        else lambda model: quantize_blocks(model.layers().values(), quant),
    )
    for number, block in enumerate(model.blocks):
        linear, wanted = block.get_submodule("ffn.2"), meant[f"blocks.{number}.ffn.2.weight"]
        if isinstance(linear, QuantizedLinear):
            assert torch.allclose(
                linear.dequantize_rows(torch.float32), wanted, rtol=0.07, atol=1e-4
            )
        else:
            assert torch.equal(linear.weight, wanted)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    fp8_file(tmp_path / "fp8.safetensors", "scale_weight", "")
    tensors = load_file(tmp_path / "fp8.safetensors")
    tensors["blocks.1.ffn.2.scale_weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(
        InputError,
        match=r"blocks\.1\.ffn\.2\.scale_weight has shape \(2, 2\); scales of .* are one, or one a row",
    ):
        TensorFiles([tmp_path / "fp8.safetensors"])


def test_a_transformers_file_that_is_not_there(tmp_path: Path) -> None:
    for task, files, message in (
        ("t2v-1.3B", [tmp_path / "no.safetensors"], "cannot be read: No such file"),
        ("t2v-1.3B", [tmp_path / "a", tmp_path / "b"], "this task takes one, not 2 files"),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(
                FIXTURES / "wan2.1-t2v", TASKS[task], torch.float32, given_files={"dit_file": files}
            )
