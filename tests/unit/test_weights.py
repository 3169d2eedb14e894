import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import FIXTURES
from wan_dist.catalog import ORIGINAL_LAYOUT, TASKS
from wan_dist.errors import InputError
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.transformer import TransformerDims, WanTransformer
from wan_dist.models.vae import WanVae
from wan_dist.weights import checkpoint as checkpoint_module
from wan_dist.weights.checkpoint import find_checkpoint, open_checkpoint
from wan_dist.weights.files import Shape, TensorFiles, open_sharded
from wan_dist.weights.load import check_keys, fill
from wan_dist.weights.names import (
    KeyMap,
    text_encoder_dims,
    text_encoder_keys,
    transformer_dims,
    transformer_keys,
    vae_dims,
    vae_keys,
)

CPU = torch.device("cpu")
TRANSFORMER = "diffusion_pytorch_model.safetensors"


class Manifest(TensorFiles):
    """The keys and shapes of a published file, without the file."""

    def __init__(self, name: str) -> None:
        content = json.loads((FIXTURES / f"manifests/{name}.json").read_text())
        self.config = content.get("config")
        self.num_params = content["num_params"]
        self.paths = (Path(name),)
        self.shapes: dict[str, Shape] = {key: tuple(shape) for key, shape in content["tensors"].items()}


def _transformer(files: Manifest) -> nn.Module:
    return WanTransformer(transformer_dims(files.config, files.shapes), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "build", "keys"),
    [
        ("wan2.1-t2v-1.3B", _transformer, transformer_keys),
        ("wan2.1-t2v-14B", _transformer, transformer_keys),
        (
            "umt5-xxl-encoder",
            lambda files: build_text_encoder(text_encoder_dims(files.shapes), torch.bfloat16),
            text_encoder_keys,
        ),
        ("vae-2.1", lambda files: WanVae(vae_dims(files.shapes)), vae_keys),
    ],
)
def test_published_checkpoints_fit(name: str, build: Callable[[Manifest], nn.Module], keys: KeyMap) -> None:
    files = Manifest(name)
    with torch.device("meta"):
        model = build(files)
    check_keys(model, files, keys)
    assert sum(parameter.numel() for parameter in model.parameters()) == files.num_params


@pytest.mark.parametrize(("task", "manifest"), [("t2v-1.3B", "wan2.1-t2v-1.3B"), ("t2v-14B", "wan2.1-t2v-14B")])
def test_the_catalog_knows_the_published_sizes(task: str, manifest: str) -> None:
    files, shape = Manifest(manifest), TASKS[task].transformer
    assert shape is not None
    assert TransformerDims(**vars(shape)) == transformer_dims(files.config, files.shapes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "wan2.1-t2v", copy)
    return copy


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TRANSFORMER)
    change(tensors)
    save_file(tensors, folder / TRANSFORMER)


def _refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder, torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_keys_are_one_error(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.1.self_attn.k.weight"], tensors["head.head.bias"]
        tensors["blocks.9.extra"] = torch.zeros(1)
        tensors["blocks.0.ffn.0.bias"] = torch.zeros(7)

    _change(folder, damage)
    message = _refusal(folder)
    assert str(folder / TRANSFORMER) in message
    assert "2 missing: blocks.1.self_attn.k.weight, head.head.bias" in message
    assert "1 unexpected: blocks.9.extra" in message
    assert "1 of the wrong shape: blocks.0.ffn.0.bias (7,), not (128,)" in message


def test_only_the_first_ten_keys_are_named(folder: Path) -> None:
    _change(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("blocks.2.")])
    message = _refusal(folder)
    assert "27 missing: blocks.2." in message
    assert "and 17 more" in message
    assert message.count("blocks.2.") == 10


def test_a_truncated_safetensors_file(folder: Path) -> None:
    data = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(data[:-100])
    assert f"{TRANSFORMER} is truncated: {len(data) - 100} of {len(data)} bytes" in _refusal(folder)
    (folder / TRANSFORMER).write_bytes(data[:500])
    assert "no readable safetensors header; download it again" in _refusal(folder)
    (folder / TRANSFORMER).write_bytes(b"")
    assert "no readable safetensors header" in _refusal(folder)


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / TRANSFORMER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in _refusal(folder)


@pytest.mark.parametrize("name", [ORIGINAL_LAYOUT.text_encoder, ORIGINAL_LAYOUT.vae])
@pytest.mark.parametrize("keep", [0, 1000, 50_000])
def test_a_truncated_pth_file(folder: Path, name: str, keep: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    message = _refusal(folder)
    assert f"{name} ({keep} bytes) cannot be read as PyTorch weights; download it again" in message


def test_a_pth_file_cannot_run_code(folder: Path) -> None:
    torch.save({"weight": _Evil()}, folder / ORIGINAL_LAYOUT.vae)
    assert "cannot be read as PyTorch weights" in _refusal(folder)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize("name", [ORIGINAL_LAYOUT.config, ORIGINAL_LAYOUT.text_encoder, ORIGINAL_LAYOUT.vae, ORIGINAL_LAYOUT.tokenizer])
def test_a_folder_that_lacks_something(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert _refusal(folder) == f"{folder} is not a complete Wan checkpoint: it has no {name}"


def test_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"dim": 64')
    assert "config.json is not valid JSON" in _refusal(folder)
    (folder / "config.json").write_text('{"dim": 64}')
    assert "config.json lacks num_layers, ffn_dim" in _refusal(folder)


def test_a_broken_tokenizer(folder: Path) -> None:
    for file in (folder / ORIGINAL_LAYOUT.tokenizer).iterdir():
        file.write_text("{}")
    assert "holds no tokenizer that can be read" in _refusal(folder)
    for file in (folder / ORIGINAL_LAYOUT.tokenizer).iterdir():
        file.unlink()
    assert "holds no tokenizer that can be read" in _refusal(folder)


def test_weights_of_another_model(folder: Path) -> None:
    shutil.copy(folder / ORIGINAL_LAYOUT.vae, folder / ORIGINAL_LAYOUT.text_encoder)
    assert "the weights hold no token_embedding.weight" in _refusal(folder)


def test_the_diffusers_layout_is_recognised(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    assert "is in the Diffusers layout, which is not supported yet" in _refusal(folder)


def _shard(folder: Path) -> list[str]:
    """Cut the transformer's file into three shards with an index."""
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    where = {key: names[i % 3] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name)
    (folder / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": where}))
    return names


def test_shards_are_one_checkpoint(folder: Path) -> None:
    whole = load_file(folder / TRANSFORMER)
    names = _shard(folder)
    files = open_sharded(folder, "diffusion_pytorch_model")
    assert sorted(files.shapes) == sorted(whole)
    assert all(torch.equal(files.read(key), value) for key, value in whole.items())
    open_checkpoint(folder, torch.float32)
    (folder / names[1]).unlink()
    assert f"1 of the 3 shards in {TRANSFORMER}.index.json are missing: {names[1]}" in _refusal(folder)


def test_fused_linears_hold_their_parts(folder: Path) -> None:
    model = open_checkpoint(folder, torch.float32).transformer.load(CPU)
    stored = load_file(folder / TRANSFORMER)
    q, k, v = model.blocks[2].self_attn.qkv.weight.chunk(3)
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(part, stored[f"blocks.2.self_attn.{name}.weight"])


def test_loading_holds_the_model_and_one_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = TensorFiles.read

    def counted(self: TensorFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counted)
    model = open_checkpoint(folder, torch.bfloat16).transformer.load(CPU)
    assert len(alive) == len(load_file(folder / TRANSFORMER))
    assert most == 1
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_fill_rejects_nothing_silently(folder: Path) -> None:
    """A parameter that the files lack cannot be left uninitialised even if the check was skipped."""
    _change(folder, lambda tensors: tensors.pop("head.head.bias"))
    files = open_sharded(folder, "diffusion_pytorch_model")
    with torch.device("meta"):
        model = WanTransformer(transformer_dims(json.loads((folder / "config.json").read_text()), files.shapes), torch.float32)
    with pytest.raises(KeyError):
        fill(model, files, transformer_keys, CPU)


def test_a_cached_repository_is_used_without_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        calls.append((repository, local_files_only))
        return str(folder)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
    assert find_checkpoint(TASKS["t2v-1.3B"]) == folder
    assert calls == [("Wan-AI/Wan2.1-T2V-1.3B", True)]


def test_a_half_downloaded_repository_is_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = folder / ORIGINAL_LAYOUT.vae
    content = vae.read_bytes()
    vae.unlink()

    def snapshot(repository: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if not local_files_only:
            vae.write_bytes(content)
        return str(folder)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
    assert open_checkpoint(find_checkpoint(TASKS["t2v-1.3B"]), torch.float32).folder == folder


def test_offline_says_which_folder_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
    with pytest.raises(InputError) as caught:
        find_checkpoint(TASKS["t2v-14B"])
    assert "hf download Wan-AI/Wan2.1-T2V-14B --local-dir FOLDER" in str(caught.value)
    assert "ckpt_dir=FOLDER" in str(caught.value)
