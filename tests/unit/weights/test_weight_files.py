"""Weight files as people have them: fp8, int8 and GGUF of many programs, against the goldens' results."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, SHARED_GOLDENS, golden_folder, relative_error
from tests.sampling import make_plain_solver
from wan_dist.models.image_encoder import encode_images
from wan_dist.models.kernels.quantized_linear import QuantizedLinear, quantize_blocks
from wan_dist.models.text_encoder import TextEncoder
from wan_dist.models.vae.model import split_frames_into_chunks
from wan_dist.pipeline.conditioning.encoders import convert_image_to_tensor
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.images import read_image
from wan_dist.tasks.registry import TASKS
from wan_dist.weights import key_maps
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
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


@pytest.mark.parametrize("values_at_once", [2**21, 64])
def test_fp8_parts_of_one_matrix_are_taken_from_their_rows(
    values_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file has q, k and v in one matrix, each is its own third of it; also a row at a time."""
    monkeypatch.setattr("wan_dist.weights.load.READ_VALUES", values_at_once)
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


SETTINGS = {"wan2.1-t2v": "dit_file", "umt5": "t5_file", "vae": "vae_file", "clip": "clip_file"}
TRANSFORMER_CASES = [
    name for name, case in EXPECTED["cases"].items() if case["model"] == "wan2.1-t2v"
]
ENCODER_CASES = [name for name, case in EXPECTED["cases"].items() if case["model"] == "umt5"]


def open_with(name: str, folder: Path) -> Checkpoint:
    """Open the golden checkpoint with one of the files, which is copied away from its name."""
    case = EXPECTED["cases"][name]
    path = folder / "x.bin"
    shutil.copy(FILES / name, path)
    if "config" in case:
        (folder / "config.json").write_text(json.dumps(case["config"]))
    setting = SETTINGS[case["model"]]
    base, task = ("wan2.1-i2v", "i2v-14B") if setting == "clip_file" else ("wan2.1-t2v", "t2v-1.3B")
    return open_checkpoint(
        golden_folder(base), TASKS[task], torch.float32, given_files={setting: [path]}
    )


@pytest.mark.parametrize("name", EXPECTED["cases"])
def test_weights_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    case = EXPECTED["cases"][name]
    checkpoint = open_with(name, tmp_path)
    components = {
        "wan2.1-t2v": (checkpoint.transformers[0], checkpoint.context_projections[0]),
        "umt5": (checkpoint.text_encoder,),
        "vae": (checkpoint.vae,),
        "clip": (checkpoint.image_encoder,),
    }[case["model"]]
    name_maps = {
        "wan2.1-t2v": key_maps.map_original_transformer,
        "umt5": key_maps.map_original_text_encoder,
        "vae": key_maps.map_original_vae,
        "clip": key_maps.map_diffusers_image_encoder,
    }
    find_names = name_maps[case["model"]](case["sums"]).find_sources
    sums = {}
    for component in components:
        model = component.load(CPU)
        for parameter_name, value in model.named_parameters():
            sources = find_names(parameter_name)
            for source, part in zip(sources, value.chunk(len(sources)), strict=True):
                sums[source.key] = part.double().abs().sum().item()
    unused = {
        key
        for key in case["sums"]
        if case["model"] == "clip"
        and key_maps.map_diffusers_image_encoder(case["sums"]).is_ignored(key)
    }
    assert sums == pytest.approx(
        {key: value for key, value in case["sums"].items() if key not in unused}, rel=1e-5, abs=1e-6
    )


def velocity(checkpoint: Checkpoint) -> torch.Tensor:
    golden = load_file(golden_folder("wan2.1-t2v") / "expected/unipc.safetensors")
    run = json.loads((golden_folder("wan2.1-t2v") / "expected/unipc.json").read_text())
    timestep = make_plain_solver(run["solver"], run["steps"], run["shift"]).timesteps[0]
    model = checkpoint.transformers[0].load(CPU)
    contexts = checkpoint.context_projections[0].load(CPU)([golden["input.context"]], None)
    latents = golden["step0.latent"].unsqueeze(0)
    timesteps = torch.tensor([[timestep]])
    (result,) = model(latents, timesteps, contexts, model.compute_rotary(latents))
    return result[0]


@pytest.fixture(scope="module")
def outputs() -> Mapping[str, torch.Tensor]:
    return load_file(FILES / "expected/files-outputs.safetensors")


@pytest.mark.parametrize("name", TRANSFORMER_CASES)
def test_transformers_compute_what_they_should(
    name: str, outputs: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    assert relative_error(velocity(open_with(name, tmp_path)), outputs[name]) < 1e-5


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_text_encoders_compute_what_they_should(
    name: str, outputs: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = open_with(name, tmp_path)
    encode = TextEncoder(
        checkpoint.text_encoder.load(CPU), checkpoint.tokenizer, text_len=512, device=CPU
    )
    texts = json.loads((FIXTURES / "components/t5_texts.json").read_text(encoding="utf-8"))
    for index in range(3):
        expected = outputs[f"{name}/t5.{index}"]
        torch.testing.assert_close(encode(texts[index]), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
def test_vae_and_image_encoder_compute_what_they_should(
    outputs: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "single/wan_2.1_vae.safetensors"
    vae = open_with(name, tmp_path).vae.load(CPU)
    components = load_file(FIXTURES / "components/wan21.safetensors")
    latents = vae.encode(split_frames_into_chunks(components["vae21.video"].unsqueeze(0)))[0]
    torch.testing.assert_close(latents, outputs[f"{name}/latent"], rtol=0, atol=1e-4)
    frames = torch.cat(list(vae.decode(components["vae21.latent"].unsqueeze(0))), dim=2)[0, :, :5]
    expected = outputs[f"{name}/decoded"].float()
    torch.testing.assert_close(frames, expected, rtol=0, atol=5e-4)  # stored in float16
    name = "single/clip_vision_h.safetensors"
    encoder = open_with(name, tmp_path).image_encoder
    assert encoder is not None
    image = convert_image_to_tensor(
        read_image(str(golden_folder("wan2.1-i2v") / "input.png"), "image")
    )
    features = encode_images(encoder.load(CPU), [image], image_size=224)
    torch.testing.assert_close(features, outputs[f"{name}/clip_fea"], rtol=0, atol=1e-4)


REFUSALS = {
    "single/refuse/nvfp4.safetensors": "nvfp4",
    "single/refuse/mxfp8.safetensors": "mxfp8",
    "single/refuse/bnb-nf4.safetensors": "bitsandbytes nf4",
    "single/refuse/scale-of-wrong-length.safetensors": r"weight_scale has shape \(32, 1\)",
    "single/refuse/marker-without-scales.safetensors": r"scaled_fp8 says .* 16 have none",
    "gguf/refuse/flux.gguf": "general.architecture is flux",
    "gguf/refuse/truncated.gguf": "is truncated: 40000 of",
    "gguf/refuse/not-gguf.gguf": "Git LFS pointer",
}
ROTATED = "single/refuse/int8-convrot.safetensors"
"""Refused when the goldens were made, and read since."""


def test_every_file_of_the_goldens_is_in_a_table() -> None:
    assert set(EXPECTED["refuse"]) in (set(), {*REFUSALS, ROTATED})


@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_cannot_be_read_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=REFUSALS[name]) as caught:
        open_checkpoint(
            golden_folder("wan2.1-t2v"),
            TASKS["t2v-1.3B"],
            torch.float32,
            given_files={"dit_file": [FILES / name]},
        )
    assert Path(name).name in str(caught.value)


@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
def test_a_rotated_weight_is_not_its_stored_values() -> None:
    files = TensorFiles([FILES / ROTATED])
    values, stored = (
        read(files, "blocks.0.self_attn.q.weight") for read in (read_all, TensorFiles.read)
    )
    assert not files.non_float_types
    # the rotation keeps lengths, as its matrix is orthogonal
    scaled = stored.float() * 0.001
    torch.testing.assert_close(values.norm(dim=1), scaled.norm(dim=1))
    assert relative_error(values, scaled) > 1


@pytest.mark.parametrize("name", TRANSFORMER_CASES)
@pytest.mark.parametrize("rows", [1, 7, 31])
def test_rows_are_those_of_the_whole(name: str, rows: int) -> None:
    files = TensorFiles([FILES / name])
    for key, shape in files.shapes.items():
        whole = read_all(files, key)
        parts = [
            files.read_values(key, start, min(start + rows, shape[0]), CPU)
            for start in range(0, shape[0], rows)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("quant", ["fp8", "int8", "int4"])
@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
def test_gguf_is_quantised_anew(quant: str, tmp_path: Path) -> None:
    """As a file of the same values in float32 is."""
    component = open_with("gguf/all-types.gguf", tmp_path).transformers[0]

    def prepare(model: torch.nn.Module) -> None:
        quantize_blocks(model.layers().values(), quant)

    plain = component.load(CPU)
    quantized = component.load(CPU, prepare_model=prepare)
    linears = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 4 * 6
    limit = {"fp8": 0.04, "int8": 0.01, "int4": 0.1}[quant]
    errors = [
        relative_error(module.dequantize_rows(torch.float32), plain.get_submodule(name).weight)
        for name, module in quantized.named_modules()
        if isinstance(module, QuantizedLinear)
    ]
    assert 0 < max(errors) < limit


@pytest.mark.skipif(not FILES.exists(), reason="the goldens are not beside this checkout")
def test_the_bytes_read_of_gguf_are_those_of_its_blocks() -> None:
    files = TensorFiles([FILES / "gguf/t2v-q8_0.gguf"])
    read_all(files, "blocks.0.ffn.0.weight")
    assert files.bytes_read == 128 * 64 // 32 * 34
    files.read_values("blocks.0.ffn.0.weight", 5, 7, CPU)
    assert files.bytes_read == 130 * 64 // 32 * 34
