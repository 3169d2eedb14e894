"""LoRAs are merged as weights are read: by rows, under fused linears, before rounding and quantisation.

The LoRA and its formulas are made here, so that a clone alone proves them.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import FIXTURES, relative_error
from tests.unit.weights.test_lora import read_weights
from wan_dist.config.loras import LoraSetting
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.kernels.quantized_linear import quantize_blocks, quantize_rows
from wan_dist.planning import lora_memory
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.load import _fill_rows as fill_rows
from wan_dist.weights.load import fill_parameters
from wan_dist.weights.streaming import StreamingOptions

CPU = torch.device("cpu")
FOLDER = FIXTURES / "wan2.1-t2v"
TRANSFORMER = FOLDER / "diffusion_pytorch_model.safetensors"
PREFIX = "diffusion_model."


def make_lora(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a LoRA of every kind, and the weights that the formulas give with it at strength 0.5, in
    float64.
    """
    base = {key: value.double() for key, value in load_file(TRANSFORMER).items()}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(0.3).bfloat16()

    lora: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}

    def add(module: str, parts: dict[str, Tensor], attribute: str, delta: Tensor) -> None:
        lora.update({f"{PREFIX}{module}.{role}": value for role, value in parts.items()})
        key = f"{module}.{attribute}"
        merged[key] = merged.get(key, base[key]) + 0.5 * delta.reshape(base[key].shape)

    def pair(module: str) -> tuple[dict[str, Tensor], Tensor]:
        out, num_inputs = base[f"{module}.weight"].flatten(1).shape
        down, up = draw(4, num_inputs), draw(out, 4)
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
        return parts, 0.5 * up.double() @ down.double()

    for module in ("blocks.1.self_attn.v", "blocks.1.cross_attn.k", "blocks.2.ffn.0", "head.head"):
        add(module, (made := pair(module))[0], "weight", made[1])
    for module, dim in (("blocks.1.self_attn.q", 1), ("blocks.1.ffn.2", 0)):
        parts, delta = pair(module)
        direction = base[f"{module}.weight"] + delta
        lengths = direction.norm(dim=dim, keepdim=True)
        wanted = (lengths * 1.2).float()
        parts["dora_scale"] = wanted
        add(
            module,
            parts,
            "weight",
            direction * wanted.double() / lengths - base[f"{module}.weight"],
        )
    first, second = (draw(64, 3), draw(3, 64)), (draw(64, 3), draw(3, 64))
    hada = {
        f"hada_w{side}_{part}": pair[part == "b"]
        for side, pair in ((1, first), (2, second))
        for part in "ab"
    }
    products = [pair[0].double() @ pair[1].double() for pair in (first, second)]
    add("blocks.0.self_attn.k", hada, "weight", products[0] * products[1])
    left, right = draw(4, 8), draw(16, 8)
    add(
        "blocks.0.cross_attn.v",
        {"lokr_w1": left, "lokr_w2": right},
        "weight",
        torch.kron(left.double(), right.double()),
    )
    for key, role in (
        ("blocks.0.norm3.weight", "w_norm"),
        ("blocks.1.self_attn.v.bias", "diff_b"),
        ("blocks.0.modulation", "diff_m"),
        ("patch_embedding.weight", "diff"),
    ):
        module, _, attribute = key.rpartition(".")
        difference = draw(*base[key].shape)
        add(module, {role: difference}, attribute, difference.double())
    return lora, base | merged


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "every-kind.safetensors"
    save_file(make_lora(1)[0], file)
    return file


@pytest.fixture(params=[2**23, 300])
def _values_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these small weights some, too, are merged in several parts."""
    monkeypatch.setattr(lora_memory, "MERGED_VALUES", request.param)


in_parts = pytest.mark.usefixtures("_values_at_once")


def open_with(
    *files: Path, dtype: torch.dtype = torch.float32, transformer: Path | None = None
) -> Checkpoint:
    return open_checkpoint(
        FOLDER,
        TASKS["t2v-1.3B"],
        dtype,
        given_files={"dit_file": [transformer]} if transformer else {},
        loras=[LoraSetting("lora", file, 0.5, None) for file in files],
    )


@in_parts
def test_all_kinds_are_the_formulas(lora_file: Path) -> None:
    weights, expected = read_weights(open_with(lora_file)), make_lora(1)[1]
    assert set(weights) == set(expected)
    for key, value in expected.items():
        assert relative_error(weights[key].reshape(value.shape), value) < 1e-6, key


def test_several_loras_are_added_before_the_one_rounding(lora_file: Path, tmp_path: Path) -> None:
    """Updates of less than half a unit in bfloat16 add up; rounded in turn, they would vanish."""
    weight = load_file(TRANSFORMER)["blocks.1.ffn.0.weight"].bfloat16().float()
    small = (weight * 2**-10).contiguous()
    save_file({"blocks.1.ffn.0.diff": small}, tmp_path / "small.safetensors")
    tensors = load_file(TRANSFORMER) | {"blocks.1.ffn.0.weight": weight}
    save_file(tensors, tmp_path / "rounded.safetensors")
    files = [tmp_path / "small.safetensors"] * 8
    checkpoint = open_with(
        *files, dtype=torch.bfloat16, transformer=tmp_path / "rounded.safetensors"
    )
    merged = read_weights(checkpoint)["blocks.1.ffn.0.weight"]
    assert torch.equal(merged, (weight * (1 + 4 * 2**-10)).bfloat16())
    alone = open_with(files[0], dtype=torch.bfloat16, transformer=tmp_path / "rounded.safetensors")
    assert torch.equal(read_weights(alone)["blocks.1.ffn.0.weight"], weight.bfloat16())


def test_weights_are_rounded_after_merging(lora_file: Path) -> None:
    exact = read_weights(open_with(lora_file))
    rounded = read_weights(open_with(lora_file, dtype=torch.bfloat16))
    assert all(torch.equal(exact[key].to(value.dtype), value) for key, value in rounded.items())


@in_parts
@pytest.mark.parametrize("quant", ["fp8", "int8", "int4"])
def test_weights_are_quantised_after_merging(quant: str, lora_file: Path) -> None:
    component = open_with(lora_file).transformers[0]
    exact = component.load(CPU).state_dict()
    quantized = component.load(
        CPU, prepare_model=lambda model: quantize_blocks(model.layers().values(), quant)
    ).state_dict()
    for linear in ("blocks.1.self_attn.qkv", "blocks.1.ffn.0", "blocks.1.ffn.2"):
        for part, values in quantize_rows(exact[f"{linear}.weight"], quant).items():
            assert torch.equal(quantized[f"{linear}.{part}"], values), f"{linear}.{part}"


def test_8_bit_weights_that_no_lora_touches_stay_as_they_are(
    lora_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(TRANSFORMER)
    for part in "qkv":
        key = f"blocks.1.self_attn.{part}.weight"
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[key.replace("weight", "scale_weight")] = scale
    file = tmp_path / "fp8.safetensors"
    save_file(tensors, file)
    component = open_with(lora_file, transformer=file).transformers[0]
    exact = component.load(CPU).state_dict()["blocks.1.self_attn.qkv.weight"].chunk(3)
    loaded = component.load(
        CPU, prepare_model=lambda model: quantize_blocks(model.layers().values(), "fp8")
    ).state_dict()
    weights = loaded["blocks.1.self_attn.qkv.weight"].chunk(3)
    scales = loaded["blocks.1.self_attn.qkv.scale"].chunk(3)
    for part, weight, scale, merged in zip("qkv", weights, scales, exact, strict=True):
        if part == "k":
            key = "blocks.1.self_attn.k.weight"
            assert torch.equal(weight.view(torch.uint8), tensors[key].view(torch.uint8))
            assert torch.equal(scale, tensors[key.replace("weight", "scale_weight")].expand(64, 1))
        else:
            expected = quantize_rows(merged, "fp8")
            assert torch.equal(weight.view(torch.uint8), expected["weight"].view(torch.uint8))
            assert torch.equal(scale, expected["scale"])


@in_parts
@pytest.mark.parametrize(
    "name", ["blocks.1.self_attn.qkv.weight", "blocks.1.ffn.2.weight", "blocks.0.modulation"]
)
def test_rows_of_a_shard_are_those_of_the_whole(name: str, lora_file: Path) -> None:
    component = open_with(lora_file).transformers[0]
    whole = component.load(CPU).state_dict()[name]
    sources = component.key_map.find_sources(name)
    starts = sorted({0, len(whole) // 5, len(whole) // 2, len(whole)})
    for start, stop in pairwise(starts):
        part = torch.empty_like(whole[start:stop])
        fill_rows([part], start, len(whole), component.files, sources, CPU)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-6, atol=1e-6)


def test_parameters_of_a_block_are_filled_anew_each_time(lora_file: Path) -> None:
    """As streaming from disk does it: nothing of a LoRA may be added twice."""
    component = open_with(lora_file).transformers[0]
    expected = component.load(CPU).state_dict()
    for _ in range(2):
        parameters = {
            name: torch.empty_like(value)
            for name, value in expected.items()
            if name.startswith("blocks.1.")
        }
        fill_parameters(parameters, component.files, component.key_map, CPU)
        assert all(torch.equal(value, expected[name]) for name, value in parameters.items())


@in_parts
@pytest.mark.parametrize("from_disk", [False, True])
def test_streamed_blocks_are_merged(from_disk: bool, lora_file: Path) -> None:
    checkpoint = open_with(lora_file)
    golden = load_file(FOLDER / "expected/unipc.safetensors")
    latents = golden["step0.latent"].unsqueeze(0)
    contexts = checkpoint.context_projections[0].load(CPU)([golden["input.context"]])
    velocities = []
    for streaming in (
        None,
        StreamingOptions(FusedTransformer.layers, from_disk=from_disk, num_rounds=1),
    ):
        model = checkpoint.transformers[0].load(
            CPU, streaming=streaming, inner_attention=InnerAttention()
        )
        rotary = model.compute_rotary(latents)
        velocities.append(model(latents, torch.tensor([[900]]), contexts, rotary)[0])
    assert torch.equal(*velocities)


def test_a_changed_lora_changes_the_digest(lora_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(make_lora(2)[0], other)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(lora_file.read_bytes())

    def digest(*loras: tuple[Path, float]) -> str:
        settings = [LoraSetting("lora", file, strength, None) for file, strength in loras]
        return open_checkpoint(FOLDER, TASKS["t2v-1.3B"], torch.float32, loras=settings).digest

    same = digest((lora_file, 1.0))
    assert digest((copy, 1.0)) == same
    others = [
        digest(),
        digest((lora_file, 0.5)),
        digest((other, 1.0)),
        digest((lora_file, 1.0), (other, 1.0)),
        digest((other, 1.0), (lora_file, 1.0)),
    ]
    assert len({same, *others}) == 6


def test_alphas_beside_a_file_change_the_digest(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    module = "base_model.model.blocks.0.ffn.0"
    save_file(
        {
            f"{module}.lora_A.weight": torch.ones(4, 64),
            f"{module}.lora_B.weight": torch.ones(128, 4),
        },
        file,
    )
    found = []
    for alpha in (4, 8):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        checkpoint = open_with(file)
        found.append((checkpoint.digest, read_weights(checkpoint)["blocks.0.ffn.0.weight"]))
    assert found[0][0] != found[1][0]
    base = load_file(TRANSFORMER)["blocks.0.ffn.0.weight"]
    torch.testing.assert_close(found[0][1], base + 2)
    torch.testing.assert_close(found[1][1], base + 4)


REFUSED = {
    "blocks.0.self_attn.q.lora_mid.weight": "is LoCon with a core (lora_mid)",
    "blocks.0.self_attn.q.a1.weight": "is GLoRA",
    "blocks.0.self_attn.q.vera_lambda_b": "is VeRA",
    "blocks.0.self_attn.q.ia3_l": "is IA3",
    "blocks.0.self_attn.q.set_weight": "is whole weights that replace the model's (set_weight)",
    "blocks.0.self_attn.q.reshape_weight": "is weights of another shape (reshape_weight)",
    "blocks.0.self_attn.q.proj_down": "is Nunchaku",
    "blocks.0.self_attn.q.hada_t1": "is LoHa or LoKr of convolutions",
    "blocks.0.self_attn.q.oft_diag": "is OFT",
    "blocks.0.self_attn.q.lora_up.bias": "has a bias of lora_B (lora_up) and no lora_A",
    "blocks.0.self_attn.q.lokr_w1": "has lokr_w1 and no lokr_w2",
    "blocks.0.self_attn.q.hada_w1_a": "has hada_w1_a and no hada_w1_b",
    "blocks.0.self_attn.q.dora_scale": "has dora_scale and no lora_A",
    "blocks.0.self_attn.norm_q.diff_b": "of parameters that their modules do not have",
    "blocks.0.self_attn.q.lora_C.weight": "of no known kind",
}


@pytest.mark.parametrize("key", REFUSED)
def test_kinds_that_are_not_read_are_named(key: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    module = "blocks.0.self_attn.k"
    pair = {
        f"{module}.lora_A.weight": torch.ones(4, 64),
        f"{module}.lora_B.weight": torch.ones(64, 4),
    }
    save_file(
        {f"{PREFIX}{name}": value for name, value in (pair | {key: torch.ones(64)}).items()}, file
    )
    with pytest.raises(InputError) as caught:
        open_with(file)
    assert f"lora={file}" in str(caught.value)
    assert REFUSED[key] in str(caught.value)


def test_whole_numbers_and_two_adapters_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    down, up = torch.ones(4, 64), torch.ones(64, 4)
    module = "blocks.0.self_attn.q"
    save_file({f"{module}.lora_A.weight": down.to(torch.int8), f"{module}.lora_B.weight": up}, file)
    with pytest.raises(InputError, match=r"blocks.0.self_attn.q is of I8, not of floats"):
        open_with(file)
    save_file(
        {
            f"{module}.lora_{part}.{name}.weight": value.clone()
            for name in "xy"
            for part, value in (("A", down), ("B", up))
        },
        file,
    )
    with pytest.raises(InputError, match="two adapters"):
        open_with(file)


def test_a_lora_of_pytorchs_format(lora_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.pt"
    torch.save(load_file(lora_file), file)
    wanted, found = read_weights(open_with(lora_file)), read_weights(open_with(file))
    for _ in range(2):  # the file's own memory stays as it is
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        found = read_weights(open_with(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), ("folder", "is a folder; give the file in it")],
)
def test_what_is_no_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    if content == "folder":
        path.mkdir()
    with pytest.raises(InputError) as caught:
        open_with(path)
    assert f"lora={path} {message}" in str(caught.value)
