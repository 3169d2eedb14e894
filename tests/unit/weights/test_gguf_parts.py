"""A transformer whose weights stay in a GGUF file's blocks computes what decoded ones do, bit for bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import FIXTURES, golden_folder
from tests.live_bytes import LiveBytes
from tests.unit.weights.test_weight_files import EXPECTED, FILES, TRANSFORMER_CASES
from tests.weight_files import TRANSFORMER_FILE, WHOLE, write_gguf
from wan_dist.config.loras import LoraSetting
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.gguf_linear import GgufLinear, compress_blocks
from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS, DECODED_VALUES, decode_weight
from wan_dist.planning import gguf_memory
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.gguf_parts import find_weight_parts
from wan_dist.weights.streaming import StreamingOptions

CPU = torch.device("cpu")
GGUF_CASES = [name for name in TRANSFORMER_CASES if name.startswith("gguf/")]
PLACEMENTS = {
    "resident": None,
    "stream": StreamingOptions(FusedTransformer.layers),
    "disk": StreamingOptions(FusedTransformer.layers, from_disk=True),
}


def open_golden(path: Path, dtype: torch.dtype, *loras: LoraSetting) -> Checkpoint:
    return open_checkpoint(
        golden_folder("wan2.1-t2v"),
        TASKS["t2v-1.3B"],
        dtype,
        given_files={"dit_file": [path]},
        loras=loras,
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """The golden transformer with five types in each block, three of them in q, k and v."""
    path = tmp_path / "mixed.gguf"
    write_gguf(path, load_file(WHOLE / TRANSFORMER_FILE))
    shutil.copy(WHOLE / "config.json", tmp_path)
    return path


def load(
    checkpoint: Checkpoint, placement: str = "resident", *, compressed: bool
) -> FusedTransformer:
    component = checkpoint.transformers[0]

    def prepare(model: FusedTransformer) -> None:
        if compressed:
            layers = model.layers()
            compress_blocks(layers, find_weight_parts(layers, component.files, component.key_map))

    return component.load(CPU, prepare_model=prepare, streaming=PLACEMENTS[placement])


def predict(checkpoint: Checkpoint, model: FusedTransformer) -> Tensor:
    """Return the velocities of the golden's latents for two contexts, at the second of two calls."""
    golden = load_file(FIXTURES / "wan2.1-t2v/expected/unipc.safetensors")
    texts = [golden["input.context"], golden["input.context"][:3].contiguous()]
    projection = checkpoint.context_projections[0].load(CPU)
    contexts = projection(texts, None)
    assert len(contexts) == 2
    latents = golden["step0.latent"].unsqueeze(0)
    rotary = model.compute_rotary(latents)
    for timestep in (900.0, 500.0):
        velocities = model(latents, torch.tensor([[timestep]]), contexts, rotary)
    return torch.cat(velocities)


def list_linears(model: FusedTransformer) -> list[GgufLinear]:
    return [module for module in model.modules() if isinstance(module, GgufLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GGUF_CASES)
def test_every_type_gives_what_decoded_weights_give(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    shutil.copy(FILES / name, tmp_path / "x.gguf")
    if "config" in EXPECTED["cases"][name]:
        (tmp_path / "config.json").write_text(json.dumps(EXPECTED["cases"][name]["config"]))
    checkpoint = open_golden(tmp_path / "x.gguf", dtype)
    expected = predict(checkpoint, load(checkpoint, compressed=False))
    for placement in PLACEMENTS:
        model = load(checkpoint, placement, compressed=True)
        assert torch.equal(predict(checkpoint, model), expected), placement
        assert bool(list_linears(model)) == ("bf16" not in name)
    planned = checkpoint.compressed_blocks
    if "bf16" in name:
        assert planned is None
        return
    assert planned is not None
    bytes_by_block = [
        sum(parameter.nbytes for parameter in block.parameters())
        for block in load(checkpoint, compressed=True).layers().values()
    ]
    assert (planned.block_bytes, planned.all_bytes) == (max(bytes_by_block), sum(bytes_by_block))


@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
def test_the_goldens_have_all_types() -> None:
    names = set()
    for name in GGUF_CASES:
        files = open_golden(FILES / name, torch.float32).transformers[0].files
        names |= {files.get_type_name(key) for key in files.shapes}
    assert set(BLOCK_FORMATS) <= names


@pytest.mark.parametrize("slice_tokens", [None, 7])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parts_of_one_linear_have_types_of_their_own(
    placement: str, slice_tokens: int | None, mixed: Path
) -> None:
    checkpoint = open_golden(mixed, torch.bfloat16)
    models = [load(checkpoint, placement, compressed=value) for value in (False, True)]
    for model in models:
        model.set_slice_tokens(slice_tokens)
    expected, result = (predict(checkpoint, model) for model in models)
    assert torch.equal(result, expected)
    types = {tuple(part.type_name for part in linear.parts) for linear in list_linears(models[1])}
    assert types == {("Q8_0", "Q5_1", "Q4_0"), ("Q8_0",), ("Q5_0",)}


def test_memory_holds_blocks_and_one_decoded_block(mixed: Path) -> None:
    checkpoint = open_golden(mixed, torch.bfloat16)
    model = load(checkpoint, compressed=True)
    sizes = checkpoint.compressed_blocks
    assert sizes is not None
    blocks = [
        sum(parameter.nbytes for parameter in block.parameters())
        for block in model.layers().values()
    ]
    assert (sizes.block_bytes, sizes.all_bytes) == (max(blocks), sum(blocks))
    assert (sizes.num_weights, sizes.num_changed) == (8 * len(blocks), 0)
    plain = load(checkpoint, compressed=False)
    matrices = [
        sum(parameter.nbytes for parameter in block.parameters() if parameter.dim() == 2)
        for block in plain.layers().values()
    ]
    assert sizes.decoded_bytes == max(matrices)
    assert sizes.all_bytes < 0.6 * sum(
        parameter.nbytes for block in plain.layers().values() for parameter in block.parameters()
    )
    most: list[int] = []

    def note(*_: object) -> None:
        held = [linear._decoded_weight for linear in list_linears(model)]
        most.append(sum(weight.nbytes for weight in held if weight is not None))

    for module in model.modules():
        if not isinstance(module, FusedTransformer):
            module.register_forward_hook(note)
    predict(checkpoint, model)
    assert max(most) == sizes.decoded_bytes
    assert not any(linear._decoded_weight is not None for linear in list_linears(model))


def test_each_weight_is_decoded_once_in_a_step(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For both contexts and all slices of tokens."""
    num_decoded = []

    def count(decode: Callable[..., None] = decode_weight) -> Callable[..., None]:
        return lambda *arguments: (num_decoded.append(1), decode(*arguments))[1]

    monkeypatch.setattr("wan_dist.models.gguf_linear.decode_weight", count())
    checkpoint = open_golden(mixed, torch.bfloat16)
    model = load(checkpoint, compressed=True)
    model.set_slice_tokens(7)
    predict(checkpoint, model)
    sizes = checkpoint.compressed_blocks
    assert sizes is not None
    assert len(num_decoded) == 2 * sizes.num_weights  # two steps


def test_weights_are_freed_where_a_block_fails(mixed: Path) -> None:
    model = load(open_golden(mixed, torch.bfloat16), compressed=True)
    block = model.layers()["blocks.1"]
    block.ffn[2].register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        predict(open_golden(mixed, torch.bfloat16), model)
    assert not any(linear._decoded_weight is not None for linear in list_linears(model))


def save_lora(path: Path, modules: list[str]) -> LoraSetting:
    weights = load_file(WHOLE / TRANSFORMER_FILE)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        num_rows, num_columns = weights[f"{module}.weight"].shape
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((2, num_columns), (num_rows, 2))
        )
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down.mul(0.1)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up.mul(0.1)
    save_file(tensors, path)
    return LoraSetting("lora", path, 1.0, None)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loras_are_merged_into_decoded_weights(placement: str, mixed: Path, tmp_path: Path) -> None:
    modules = ["blocks.0.self_attn.k", "blocks.1.ffn.0", "blocks.2.cross_attn.k"]
    lora = save_lora(tmp_path / "lora.safetensors", modules)
    checkpoint = open_golden(mixed, torch.bfloat16, lora)
    model = load(checkpoint, placement, compressed=True)
    expected = predict(checkpoint, load(checkpoint, compressed=False))
    assert torch.equal(predict(checkpoint, model), expected)
    without = open_golden(mixed, torch.bfloat16)
    assert not torch.equal(expected, predict(without, load(without, compressed=True)))
    qkv = model.get_submodule("blocks.0.self_attn.qkv")
    assert isinstance(qkv, GgufLinear)
    assert [part.merge is not None for part in qkv.parts] == [False, True, False]
    # keys of cross-attention are no linear of the blocks
    sizes = without.compressed_blocks
    assert sizes is not None
    assert checkpoint.compressed_blocks == replace(sizes, num_changed=2)


def test_what_cannot_stay_compressed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a GGUF file .*, as Q4_K, .*safetensors is not"):
        open_golden(WHOLE / TRANSFORMER_FILE, torch.bfloat16).check_compression()
    halves = tmp_path / "halves.gguf"
    write_gguf(
        halves,
        load_file(WHOLE / TRANSFORMER_FILE),
        choose=lambda name, value: GgmlType.BF16 if value.dim() == 2 else GgmlType.F32,
    )
    with pytest.raises(InputError, match=r"needs a GGUF file .*halves\.gguf is not"):
        open_golden(halves, torch.bfloat16).check_compression()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_decoding_takes_what_the_plan_counts(name: str) -> None:
    assert gguf_memory.DECODED_VALUES == DECODED_VALUES
    block_format = BLOCK_FORMATS[name]
    num_rows, num_columns = 5120, 13824
    row_bytes = num_columns // block_format.num_values * block_format.num_bytes
    rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device="meta")
    out = torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device="meta")
    with LiveBytes([rows, out]) as live:
        decode_weight(rows, block_format, out)
    assert 0.2 * gguf_memory.DECODING_BYTES < live.peak < gguf_memory.DECODING_BYTES
