"""Files of few-step models: rCM's names, TurboDiffusion's 8-bit tiles, and attention that is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import golden_folder
from tests.weight_files import TRANSFORMER_FILE, WHOLE
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.files import TensorFiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(WHOLE / TRANSFORMER_FILE)


def write_transformer(folder: Path, tensors: dict[str, Tensor], name: str = "a.pt") -> Path:
    shutil.copy(WHOLE / "config.json", folder)
    torch.save(tensors, folder / name)
    return folder / name


def open_with(path: Path) -> Checkpoint:
    files = {"dit_file": [path]}
    return open_checkpoint(WHOLE, TASKS["t2v-1.3B"], torch.float32, given_files=files)


def read_parameters(path: Path) -> dict[str, Tensor]:
    checkpoint = open_with(path)
    components = (checkpoint.transformers[0], checkpoint.context_projections[0])
    return {
        name: parameter
        for component in components
        for name, parameter in component.load(CPU).named_parameters()
    }


def assert_same_parameters(path: Path, expected_path: Path) -> None:
    found, expected = read_parameters(path), read_parameters(expected_path)
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("prefix", ["", "net."])
def test_rcm_stores_the_patch_embedding_as_a_linear(
    prefix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "patch_embedding.weight"
    tensors = weights | {name: weights[name].flatten(1)}
    path = write_transformer(tmp_path, {f"{prefix}{key}": value for key, value in tensors.items()})
    assert_same_parameters(path, write_transformer(tmp_path, weights, "expected.pt"))


def test_a_patch_embedding_of_another_model_is_refused(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    for shape in ((64, 63), (64, 16, 4)):
        path = write_transformer(tmp_path, weights | {"patch_embedding.weight": torch.zeros(shape)})
        with pytest.raises(InputError, match=r"patch_embedding\.weight of shape"):
            open_with(path)


def decode_tiles(codes: Tensor, scales: Tensor) -> Tensor:
    values = codes.float()
    for row, column in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        tile = (
            slice(128 * row, 128 * (row + 1)),
            slice(128 * column, 128 * (column + 1)),
        )
        values[tile] *= scales[row, column]
    return values


def test_tiles_of_the_golden_are_decoded(tmp_path: Path) -> None:
    golden = load_file(golden_folder("fewstep") / "attention.safetensors")
    codes, scales = golden["int8.int8_weight"], golden["int8.scale"]
    save_file({"a.int8_weight": codes, "a.scale": scales}, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    values = files.read_values("a.int8_weight", 0, len(codes), CPU)
    assert torch.equal(values, decode_tiles(codes, scales))
    # +amax becomes 127 rather than 128: one whole step off.
    assert ((values - golden["int8.w"].float()).abs() <= 1.001 * scales.max()).all()
    assert (values - golden["int8.w"].float()).abs().mean() < 0.3 * scales.max()
    assert torch.equal(files.read_values("a.int8_weight", 120, 140, CPU), values[120:140])
    assert files.shapes.keys() == {"a.int8_weight"}


def quantize(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a transformer as TurboDiffusion quantises it, with a scale of its own for each tile."""
    stored, values = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2:
            num_tiles = [-(-length // 128) for length in weight.shape]
            scales = weight.abs().max() / 128 * (1 + torch.arange(num_tiles[0] * num_tiles[1]))
            scales = scales.view(num_tiles).float()
            steps = decode_tiles(torch.ones(weight.shape), scales)
            codes = (weight / steps).round().clamp(-128, 127).to(torch.int8)
            del stored[name]
            stem = name.removesuffix("weight")
            stored |= {f"{stem}int8_weight": codes, f"{stem}scale": scales}
            values[name] = decode_tiles(codes, scales)
    return stored, values


def test_a_transformer_in_tiles_has_the_decoded_weights(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    stored, values = quantize(weights)
    path = write_transformer(tmp_path, stored)
    assert_same_parameters(path, write_transformer(tmp_path, values, "expected.pt"))


DAMAGES = {
    "no scale": (lambda stored, key: stored.pop(key), "have none"),
    "a scale for each row": (
        lambda stored, key: stored.update({key: torch.ones(64, 1)}),
        r"has scales of \(1, 1\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tiles_without_their_scales_are_refused(
    damage: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    stored, _ = quantize(weights)
    change, message = DAMAGES[damage]
    change(stored, "blocks.1.self_attn.q.scale")
    with pytest.raises(InputError, match=message):
        open_with(write_transformer(tmp_path, stored))
