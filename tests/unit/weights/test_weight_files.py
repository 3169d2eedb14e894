"""Weight files as people have them: fp8, int8 and GGUF of many programs, against the goldens' results."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import SHARED_GOLDENS
from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.key_maps import KeyMap, TensorSource
from wan_dist.weights.load import fill_parameters

CPU = torch.device("cpu")
FILES = SHARED_GOLDENS / "files"
EXPECTED = (
    json.loads((FILES / "expected/files.json").read_text(encoding="utf-8"))
    if FILES.exists()
    else {"cases": {}, "refuse": {}}
)


def json_bytes(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def read_all(files: TensorFiles, name: str) -> torch.Tensor:
    return files.read_values(name, 0, files.shapes[name][0], CPU)


WEIGHT = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
ROWS = WEIGHT.abs().amax(1, keepdim=True)


def rotated_int8(size: int) -> dict[str, torch.Tensor]:
    """As ComfyUI's converters write it: groups of columns times a regular Hadamard matrix."""
    factor = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
    matrix = torch.ones(1, 1).double()
    while len(matrix) < size:
        matrix = torch.kron(matrix, factor)
    matrix = matrix / size**0.5
    rotated = (WEIGHT.double().view(8, -1, size) @ matrix.T).view(8, 64)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    return {
        "m.weight": (rotated / scale).round().to(torch.int8),
        "m.weight_scale": scale.float(),
        "m.comfy_quant": json_bytes(
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        ),
    }


def eight_bit(dtype: torch.dtype, scale_name: str, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    values = WEIGHT / scale.reshape(-1, 1)
    return {
        "m.weight": (values.round() if dtype == torch.int8 else values).to(dtype),
        f"m.{scale_name}": scale,
    }


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ENCODINGS = {
    "e4m3, one scale": eight_bit(E4M3, "scale_weight", WEIGHT.abs().max() / 448),
    "e5m2, one scale": eight_bit(E5M2, "scale_weight", WEIGHT.abs().max().view(1) / 57344),
    "e5m2, a scale a row": eight_bit(E5M2, "weight_scale", ROWS / 57344),
    "int8, one scale": eight_bit(torch.int8, "weight_scale", WEIGHT.abs().max() / 127),
    "int8, a scale a row": eight_bit(torch.int8, "weight_scale", ROWS / 127),
    "a scale in bfloat16": eight_bit(E4M3, "weight_scale", (ROWS / 400).bfloat16()),
    "int8, rotated by 64": rotated_int8(64),
    "int8, rotated by 16": rotated_int8(16),
    "int8, rotated by 4": rotated_int8(4),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_are_those_that_were_stored(encoding: str, suffix: str, tmp_path: Path) -> None:
    stored = ENCODINGS[encoding] | {"m.input_scale": torch.tensor(0.5), "m.bias": torch.zeros(8)}
    path = tmp_path / f"m{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    files = TensorFiles([path])
    assert sorted(files.shapes) == ["m.bias", "m.weight"]
    assert not files.non_float_types
    values = read_all(files, "m.weight")
    assert values.dtype == torch.float32
    # what rounding to 8 bits may change: half of the last of 3 or 2 bits, or of 1/127 of the largest
    precision = {E4M3: 2**-4, E5M2: 2**-3, torch.int8: 0.05}[stored["m.weight"].dtype]
    torch.testing.assert_close(values, WEIGHT, rtol=precision, atol=0.05)
    if "rotated" not in encoding:
        scale = next(value for key, value in stored.items() if "scale" in key)
        exact = stored["m.weight"].double() * scale.double().reshape(-1, 1)
        assert torch.equal(values, exact.float())
    else:
        # of the rotation alone, without rounding
        scale = stored["m.weight_scale"].double()
        error = (values.double() - WEIGHT).norm() / WEIGHT.norm()
        assert error < 0.01 < ((stored["m.weight"] * scale) - WEIGHT).norm() / WEIGHT.norm()
    rows = torch.cat([files.read_values("m.weight", row, row + 2, CPU) for row in range(0, 8, 2)])
    torch.testing.assert_close(rows, values, rtol=0, atol=1e-6)


def test_fp8_parts_of_one_matrix_are_taken_from_their_rows(tmp_path: Path) -> None:
    """Where a file has q, k and v in one matrix, each is its own third of it."""
    stored = eight_bit(E4M3, "weight_scale", ROWS / 448)
    save_file(stored, tmp_path / "m.safetensors")
    files = TensorFiles([tmp_path / "m.safetensors"])
    part = {
        "weight": torch.empty(2, 64, dtype=E4M3),
        "scale": torch.empty(2, 1),
    }
    fill_parameters(
        {f"x.{name}": value for name, value in part.items()},
        files,
        KeyMap(lambda _: (TensorSource("m.weight", 3, 4),)),
        CPU,
    )
    assert torch.equal(part["weight"].view(torch.uint8), stored["m.weight"][6:].view(torch.uint8))
    assert torch.equal(part["scale"], stored["m.weight_scale"][6:])


def _changed(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return ENCODINGS["e4m3, one scale"] | {
        key.replace("__", "."): value for key, value in changes.items()
    }


def _described(**entries: object) -> dict[str, torch.Tensor]:
    stored = ENCODINGS["int8, a scale a row"]
    return stored | {"m.comfy_quant": json_bytes({"format": "int8_tensorwise"} | entries)}


REFUSED = [
    ("nvfp4", _changed(m__weight_scale_2=torch.ones(1)), "nvfp4"),
    ("nvfp4 of LightX2V", _changed(m__weight_global_scale=torch.ones(1)), "nvfp4"),
    (
        "mxfp8",
        {"m.weight": WEIGHT.to(E4M3), "m.weight_scale": torch.full((8, 2), 127).to(torch.uint8)},
        "mxfp8",
    ),
    ("awq", _changed(n__qzeros=torch.ones(1)), "AWQ or GPTQ"),
    ("Nunchaku", _changed(n__wscales=torch.ones(1)), "Nunchaku"),
    ("quanto", _changed(n__weight___data=torch.ones(1)), "quanto"),
    ("ModelOpt", _changed(n__input_quantizer___amax=torch.ones(1)), "ModelOpt"),
    ("torchao", _changed(n___weight_qdata=torch.ones(1)), "torchao"),
    ("bitsandbytes int8", _changed(n__SCB=torch.ones(1)), "bitsandbytes int8"),
    ("another format", _described(format="asym_w4a8_int8"), "asym_w4a8_int8"),
    ("a format of nothing", _described(format=None), "None"),
    ("another type than said", _described(format="float8_e5m2"), "is of I8"),
    ("groups of 32", _described(convrot=True, convrot_groupsize=32), "no power of 4"),
    ("groups of 256", _described(convrot=True), "in groups of 256 columns"),
    ("broken JSON", _described() | {"m.comfy_quant": torch.zeros(3).byte()}, "not a JSON object"),
    ("too few scales", _changed(m__scale_weight=torch.ones(4)), r"\(4,\); scales of a tensor"),
    ("blocks of scales", _changed(m__scale_weight=torch.ones(8, 4)), "are one, or one a row"),
    (
        "a marker without scales",
        {"m.weight": WEIGHT.to(E4M3), "scaled_fp8": torch.zeros(2).to(E4M3)},
        "1 have none: m.weight",
    ),
    (
        "a prefixed marker without scales",
        {"model.diffusion_model.m.weight": WEIGHT.to(E5M2)}
        | {"model.diffusion_model.scaled_fp8": torch.zeros(0)},
        "1 have none: model.diffusion_model.m.weight",
    ),
    (
        "a format without scales",
        {"m.weight": WEIGHT.to(E4M3), "m.comfy_quant": json_bytes({"format": "float8_e4m3fn"})},
        "1 have none: m.weight",
    ),
]


@pytest.mark.parametrize(
    ("stored", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_formats_that_are_not_read_are_named(
    stored: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file({key: value.clone() for key, value in stored.items()}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"m\.safetensors: .*{message}"):
        TensorFiles([tmp_path / "m.safetensors"])


def test_scales_that_were_not_applied_are_left_in_the_table(tmp_path: Path) -> None:
    """So that a model's check finds them unexpected."""
    stored = {"m.weight": WEIGHT.bfloat16(), "m.weight_scale": torch.ones(8, 1)}
    save_file(stored, tmp_path / "m.safetensors")
    assert sorted(TensorFiles([tmp_path / "m.safetensors"]).shapes) == sorted(stored)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_file(_changed(m__scale_weight=torch.tensor(float("nan"))), tmp_path / "m.safetensors")
    files = TensorFiles([tmp_path / "m.safetensors"])
    with pytest.raises(InputError, match=r"m\.scale_weight is not finite"):
        read_all(files, "m.weight")
