"""Weights that differ in one tensor have another digest, and telling them apart costs little."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wan_dist.weights import identity
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.identity import hash_weights

Tensors = dict[str, Tensor]
KINDS = (".safetensors", ".pth")


@pytest.fixture(params=["small", "large"], autouse=True)
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "large":
        monkeypatch.setattr(identity, "_WHOLE_BYTES", 2**10)
        monkeypatch.setattr(identity, "_SMALL_BYTES", 2**9)
        monkeypatch.setattr(identity, "_PIECE_BYTES", 2**4)


def some_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{number}.weight": torch.randn(32, 16, generator=generator) for number in range(5)
    }
    return tensors | {
        "norm.weight": torch.randn(16, generator=generator),
        "head.weight": torch.randn(8, 16, generator=generator).bfloat16(),
    }


def write(file: Path, tensors: Tensors) -> TensorFiles:
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return TensorFiles([file])


def changed() -> Iterator[tuple[str, Tensors]]:
    for name in some_tensors():
        tensors = some_tensors()
        tensors[name] = tensors[name] * 1.01
        yield f"{name} of other values", tensors
    tensors = some_tensors()
    tensors["head.weight"].view(-1)[10] += 1
    yield "one value of a small tensor", tensors
    tensors = some_tensors()
    for place in (0, -1):
        tensors["blocks.2.weight"].view(-1)[place] += 1
        yield (
            f"value {place} of a large tensor",
            {name: tensor.clone() for name, tensor in tensors.items()},
        )
    tensors = some_tensors()
    tensors["blocks.7.weight"] = tensors.pop("blocks.4.weight")
    yield "a name", tensors
    tensors = some_tensors()
    tensors["blocks.0.weight"], tensors["blocks.1.weight"] = (
        tensors["blocks.1.weight"],
        tensors["blocks.0.weight"],
    )
    yield "a pair that is swapped", tensors
    tensors = some_tensors()
    yield "a shape", tensors | {"blocks.0.weight": tensors["blocks.0.weight"].reshape(16, 32)}
    yield "a type", tensors | {"head.weight": tensors["head.weight"].view(torch.float16)}
    yield (
        "one tensor less",
        {name: tensor for name, tensor in tensors.items() if name != "norm.weight"},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_changed_is_seen(kind: str, tmp_path: Path) -> None:
    found = {hash_weights([write(tmp_path / f"whole{kind}", some_tensors())]): "nothing"}
    for number, (what, tensors) in enumerate(changed()):
        digest = hash_weights([write(tmp_path / f"{number}{kind}", tensors)])
        assert digest not in found, f"{what} is taken for {found[digest]}"
        found[digest] = what


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tensors_have_one_digest_in_whatever_files(kind: str, tmp_path: Path) -> None:
    tensors = some_tensors()
    names = sorted(tensors, reverse=True)
    whole = write(tmp_path / f"whole{kind}", tensors)
    shards = [{name: tensors[name] for name in part} for part in (names[:2], names[2:])]
    for number, shard in enumerate(shards):
        write(tmp_path / f"shard{number}{kind}", shard)
    parts = TensorFiles([tmp_path / f"shard{number}{kind}" for number in range(2)])
    again = write(tmp_path / f"again{kind}", {name: tensors[name] for name in names})
    assert len({hash_weights([files]) for files in (whole, parts, again)}) == 1


def test_both_kinds_of_file_have_one_digest(tmp_path: Path) -> None:
    assert (
        len({hash_weights([write(tmp_path / f"a{kind}", some_tensors())]) for kind in KINDS}) == 1
    )


def test_which_model_has_the_tensors_counts(tmp_path: Path) -> None:
    high, low = (
        write(tmp_path / f"{name}.pth", {"weight": torch.full((4,), float(number))})
        for number, name in enumerate("hl")
    )
    assert hash_weights([high, low]) != hash_weights([low, high])
    assert hash_weights([high]) != hash_weights([high, low])
    first, second, both = (
        write(tmp_path / f"{names}.pth", {name: torch.ones(4) for name in names})
        for names in ("a", "b", "ab")
    )
    assert hash_weights([first, second]) != hash_weights([both])


def test_expanded_tensors_cost_nothing(tmp_path: Path) -> None:
    """A file of a few bytes may claim a terabyte: what is laid out, or read, of it takes no more
    than it has.
    """
    digests = set()
    for value in (1.0, 2.0):
        tensor = torch.full((1, 4), value).expand(2**36, 4)
        assert tensor.numel() * tensor.element_size() == 2**40
        digests.add(
            hash_weights(
                [
                    write(
                        tmp_path / f"{value}.pth",
                        {"weight": tensor, "transposed": torch.randn(8, 16).T},
                    )
                ]
            )
        )
    assert len(digests) == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.randn(6, 8)[:, 2:5],
        torch.ones(4).to(torch.float8_e4m3fn),
    ],
)
def test_tensors_of_any_form_have_a_digest(tensor: Tensor, tmp_path: Path) -> None:
    digests = [
        hash_weights([write(tmp_path / f"{name}.pth", {name: tensor})]) for name in ("a", "b")
    ]
    assert digests[0] != digests[1]


def test_of_large_tensors_only_pieces_are_read() -> None:
    tensor = torch.arange(2**20, dtype=torch.float32)
    pieces = list(identity._sample_pieces(tensor, is_whole=False))
    assert len(pieces) == identity._NUM_PIECES
    assert {len(piece) for piece in pieces} == {identity._PIECE_BYTES}
    values = tensor.view(torch.uint8)
    assert torch.equal(pieces[0], values[: len(pieces[0])])
    assert torch.equal(pieces[-1], values[-len(pieces[-1]) :])
