import json
import shutil
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import FIXTURES
from wan_dist.config.checks import split_file_list
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import TransformerDims
from wan_dist.models.face_encoder import FaceVideoEncoder
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.published_dims import DIMS_ANIMATE_FACE
from wan_dist.tasks.registry import TASKS
from wan_dist.weights import checkpoint_dims as dims
from wan_dist.weights import hub
from wan_dist.weights import key_maps as names
from wan_dist.weights.checkpoint import Checkpoint
from wan_dist.weights.checkpoint import open_checkpoint as open_any_checkpoint
from wan_dist.weights.device_copy import run_readers
from wan_dist.weights.files import Shape, TensorFiles, open_sharded_weights
from wan_dist.weights.hub import find_checkpoint
from wan_dist.weights.layout import TEXT_ENCODER_FILE, TOKENIZER_FOLDER
from wan_dist.weights.load import _is_sharded, check_keys, fill_model

CPU = torch.device("cpu")
TRANSFORMER = "diffusion_pytorch_model.safetensors"


VAE = "Wan2.1_VAE.pth"
T2V = TASKS["t2v-1.3B"]


def open_checkpoint(folder: Path, dtype: torch.dtype) -> Checkpoint:
    return open_any_checkpoint(folder, T2V, dtype)


class Manifest(TensorFiles):
    """The keys and shapes of a published file, without the file."""

    def __init__(self, name: str) -> None:
        content = json.loads((FIXTURES / f"manifests/{name}.json").read_text())
        self.config = content.get("config") or {}
        self.num_params = content["num_params"]
        self.paths = (Path(name),)
        self.non_float_types: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {
            key: tuple(shape) for key, shape in content["tensors"].items()
        }


def transformer(found: TransformerDims) -> nn.Module:
    """Return the models that the file of a transformer holds."""
    face_encoders = [FaceVideoEncoder(DIMS_ANIMATE_FACE)] if found.face_layers else []
    return nn.ModuleList(
        [
            build_transformer(found, torch.bfloat16),
            ContextProjection(found, torch.bfloat16),
            *face_encoders,
        ]
    )


def models_of(model: nn.Module) -> list[nn.Module]:
    return list(model) if isinstance(model, nn.ModuleList) else [model]


TRANSFORMERS = {
    "wan2.1-t2v-1.3B": "t2v-1.3B",
    "wan2.1-t2v-14B": "t2v-14B",
    "wan2.1-i2v-14B": "i2v-14B",
    "wan2.1-flf2v-14B": "flf2v-14B",
    "wan2.2-t2v-A14B": "t2v-A14B",
    "wan2.2-i2v-A14B": "i2v-A14B",
    "wan2.2-ti2v-5B": "ti2v-5B",
    "wan2.1-vace-1.3B": "vace-1.3B",
    "wan2.1-vace-14B": "vace-14B",
    "wan2.2-animate-14B": "animate-14B",
}
PUBLISHED = [
    (name, dims.infer_transformer_dims, transformer, names.map_original_transformer)
    for name in TRANSFORMERS
] + [
    (
        "umt5-xxl-encoder",
        dims.infer_text_encoder_dims,
        lambda d: build_text_encoder(d, torch.bfloat16),
        names.map_original_text_encoder,
    ),
    ("vae-2.1", dims.infer_vae_dims, WanVae, names.map_original_vae),
    ("vae-2.2", dims.infer_vae_dims, WanVae, names.map_original_vae),
    (
        "clip-vit-h-14",
        dims.infer_image_encoder_dims,
        build_image_encoder,
        names.map_original_image_encoder,
    ),
]


@pytest.mark.parametrize(
    ("name", "read", "build", "key_map"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_published_checkpoints_fit(
    name: str, read: Callable, build: Callable, key_map: Callable
) -> None:
    files = Manifest(name)
    keys = key_map(files.shapes)
    with torch.device("meta"):
        model = build(read(files.config, files, keys))
    check_keys(models_of(model), files, keys)
    unused = sum(
        torch.Size(shape).numel()
        for key, shape in files.shapes.items()
        if keys.is_ignored(key) and not key.endswith(".kernel")  # a constant, no parameter
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == files.num_params - unused
    assert (unused > 0) == (name == "clip-vit-h-14")


@pytest.mark.parametrize(("manifest", "task"), TRANSFORMERS.items())
def test_the_catalog_knows_the_published_sizes(manifest: str, task: str) -> None:
    files, shape = Manifest(manifest), TASKS[task].transformer_dims
    assert shape is not None
    found = dims.infer_transformer_dims(
        files.config, files, names.map_original_transformer(files.shapes)
    )
    assert TransformerDims(**vars(shape)) == found
    key_map = names.map_original_transformer(files.shapes)
    assert dims.infer_face_encoder_dims(files, key_map) == TASKS[task].face_encoder_dims


def test_clip_has_sixteen_heads() -> None:
    files = Manifest("clip-vit-h-14")
    found = dims.infer_image_encoder_dims({}, files, names.map_original_image_encoder(files.shapes))
    assert (found.num_layers, found.dim, found.num_heads, found.patch, found.image_size) == (
        32,
        1280,
        16,
        14,
        224,
    )


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
    _change(
        folder,
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("blocks.2.")],
    )
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


SAVED: dict[str, Callable[[dict[str, torch.Tensor], Path], object]] = {
    "new": torch.save,
    "before 1.6": lambda tensors, path: torch.save(
        tensors, path, _use_new_zipfile_serialization=False
    ),
    "wrapped": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 7}, path),
    "wrapped, before 1.6": lambda tensors, path: torch.save(
        {"model": tensors}, path, _use_new_zipfile_serialization=False
    ),
    "safetensors": save_file,
}


NAMES = [VAE, "Wan2.1_VAE.PTH", "wan2.1_vae.safetensors", "Wan2.1_VAE.ckpt", "Wan2.1_VAE.bin"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*zip(NAMES, SAVED, strict=True), (VAE, "safetensors"), (NAMES[2], "before 1.6")],
)
def test_files_are_distinguished_by_content(name: str, kind: str, folder: Path) -> None:
    wanted = open_checkpoint(folder, torch.float32).vae.load(CPU).state_dict()
    tensors = torch.load(folder / VAE, weights_only=True)
    (folder / VAE).unlink()
    SAVED[kind](tensors, folder / name)
    component = open_checkpoint(folder, torch.float32).vae
    for _ in range(2):  # what is forgotten after the first must be there again
        found = component.load(CPU).state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".bin", ".pth"])
def test_a_transformer_with_another_suffix(suffix: str, folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    (save_file if suffix == ".SAFETENSORS" else torch.save)(
        tensors, folder / f"diffusion_pytorch_model{suffix}"
    )
    open_checkpoint(folder, torch.float32)


def test_a_pickle_whose_name_is_published_is_taken_before_others(folder: Path) -> None:
    shutil.copy(folder / TEXT_ENCODER_FILE, folder / "Wan2.1_VAE.safetensors")
    open_checkpoint(folder, torch.float32)


@pytest.mark.parametrize(
    ("kind", "name"),
    list(zip(SAVED, ["0f1e2d", "a,b.pt", "model.PTH", "models [x]*.sft", "0f1e2d"], strict=True)),
)
def test_a_transformers_file_of_any_name(name: str, kind: str, folder: Path) -> None:
    """Also as the Hugging Face cache has it: a link with a suffix to a file without."""
    tensors = load_file(folder / TRANSFORMER)
    wanted = open_checkpoint(folder, torch.float32).transformers[0].load(CPU).state_dict()
    (folder / "blobs").mkdir()
    (folder / "snapshots").mkdir()
    SAVED[kind](tensors, folder / "blobs" / name)
    link = folder / "snapshots/diffusion_fp32.safetensors"
    link.symlink_to(f"../blobs/{name}")
    for path in (link, folder / "blobs" / name):
        component = open_any_checkpoint(
            folder, T2V, torch.float32, given_files={"dit_file": [path]}
        ).transformers[0]
        found = component.load(CPU).state_dict()
        assert str(component.files) == str(path)
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_transformers_file_with_the_names_of_diffusers(folder: Path) -> None:
    tensors = {
        names._apply_rename_table(key, names._DIFFUSERS_TRANSFORMER_TABLE): value
        for key, value in load_file(folder / TRANSFORMER).items()
    }
    save_file(tensors, folder / "other.safetensors")
    wanted = open_checkpoint(folder, torch.float32).transformers[0].load(CPU).state_dict()
    component = open_any_checkpoint(
        folder, T2V, torch.float32, given_files={"dit_file": [folder / "other.safetensors"]}
    ).transformers[0]
    assert all(
        torch.equal(value, wanted[key]) for key, value in component.load(CPU).state_dict().items()
    )


def test_a_comma_is_part_of_a_name_where_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c", "d, e", "b"):
        (tmp_path / name).touch()
    given = {
        "a,b": ["a,b"],
        "a,b,c": ["a,b", "c"],
        "c, a,b": ["c", "a,b"],
        "a,b,d, e": ["a,b", "d, e"],
        "c,b": ["c", "b"],
        "c ,": ["c"],
        "x,y": ["x", "y"],
        "x,y,z": ["x", "y", "z"],
    }
    assert {value: [str(path) for path in split_file_list(value)] for value in given} == given


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / TRANSFORMER).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert "is a Git LFS pointer" in _refusal(folder)


@pytest.mark.parametrize("name", [TEXT_ENCODER_FILE, VAE])
@pytest.mark.parametrize("keep", [0, 1000, 50_000])
def test_a_truncated_pth_file(folder: Path, name: str, keep: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    message = _refusal(folder)
    assert f"{name} ({keep} bytes) cannot be read as PyTorch weights; download it again" in message


def test_a_pth_file_cannot_run_code(folder: Path) -> None:
    torch.save({"weight": _Evil()}, folder / VAE)
    assert "cannot be read as PyTorch weights" in _refusal(folder)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize("name", ["config.json", TEXT_ENCODER_FILE, VAE, TOKENIZER_FOLDER])
def test_a_folder_that_lacks_something(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = _refusal(folder)
    assert message.startswith(
        f"{folder} is not a complete t2v-1.3B checkpoint in the original layout: it has no {name} (found: "
    )


def test_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"dim": 64')
    assert "config.json is not valid JSON" in _refusal(folder)
    (folder / "config.json").write_text('{"dim": 64}')
    assert "gives no number of heads that divides 64" in _refusal(folder)


def test_a_broken_tokenizer(folder: Path) -> None:
    for file in (folder / TOKENIZER_FOLDER).iterdir():
        file.write_text("{}")
    assert "has no readable tokenizer" in _refusal(folder)
    for file in (folder / TOKENIZER_FOLDER).iterdir():
        file.unlink()
    assert "has no readable tokenizer" in _refusal(folder)


def test_weights_of_another_model(folder: Path) -> None:
    shutil.copy(folder / VAE, folder / TEXT_ENCODER_FILE)
    assert (
        f"{TEXT_ENCODER_FILE} has no token_embedding.weight: it is not the expected kind of model"
        in _refusal(folder)
    )


def test_a_half_downloaded_diffusers_folder(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    message = _refusal(folder)
    assert (
        "is not a complete t2v-1.3B checkpoint in the Diffusers layout: it has no transformer/config.json"
        in message
    )
    assert "text_encoder/config.json, vae/config.json, tokenizer (found: " in message


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("i2v-14B", "it has no models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
        ("i2v-A14B", "it has no high_noise_model/config.json, low_noise_model/config.json"),
        ("ti2v-5B", "it has no Wan2.2_VAE.pth"),
    ],
)
def test_a_folder_of_another_task(folder: Path, task: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        open_any_checkpoint(folder, TASKS[task], torch.float32)
    assert message in str(caught.value)


def test_a_transformer_of_another_task(folder: Path) -> None:
    """Everything is there, but the transformer is the text-to-video one."""
    (folder / "high_noise_model").mkdir()
    for file in ("config.json", TRANSFORMER):
        shutil.copy(folder / file, folder / "high_noise_model")
    shutil.copytree(folder / "high_noise_model", folder / "low_noise_model")
    with pytest.raises(
        InputError,
        match="is not a i2v-A14B checkpoint: its transformer has 16 input channels, not 36",
    ):
        open_any_checkpoint(folder, TASKS["i2v-A14B"], torch.float32)
    open_any_checkpoint(folder, TASKS["t2v-A14B"], torch.float32)
    (folder / "low_noise_model" / TRANSFORMER).unlink()
    with pytest.raises(
        InputError, match=r"it has no low_noise_model/diffusion_pytorch_model\*\.safetensors"
    ):
        open_any_checkpoint(folder, TASKS["t2v-A14B"], torch.float32)


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
    files = open_sharded_weights(folder, "diffusion_pytorch_model")
    assert sorted(files.shapes) == sorted(whole)
    assert all(torch.equal(files.read(key), value) for key, value in whole.items())
    open_checkpoint(folder, torch.float32)
    (folder / names[1]).unlink()
    assert f"1 of the 3 shards in {TRANSFORMER}.index.json are missing: {names[1]}" in _refusal(
        folder
    )


def test_fused_linears_hold_their_parts(folder: Path) -> None:
    model = open_checkpoint(folder, torch.float32).transformers[0].load(CPU)
    stored = load_file(folder / TRANSFORMER)
    q, k, v = model.blocks[2].self_attn.qkv.weight.chunk(3)
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(part, stored[f"blocks.2.self_attn.{name}.weight"])


def test_loading_holds_the_model_and_one_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = TensorFiles.read_rows

    def counted(self: TensorFiles, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name, start, stop)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(TensorFiles, "read_rows", counted)
    checkpoint = open_checkpoint(folder, torch.bfloat16)
    checkpoint.context_projections[0].load(CPU)
    model = checkpoint.transformers[0].load(CPU)
    assert len(alive) == len(load_file(folder / TRANSFORMER))
    assert most == 1
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_fill_rejects_nothing_silently(folder: Path) -> None:
    """A parameter that the files lack cannot be left uninitialised even if the check was skipped."""
    _change(folder, lambda tensors: tensors.pop("head.head.bias"))
    files = open_sharded_weights(folder, "diffusion_pytorch_model")
    keys = names.map_original_transformer(files.shapes)
    with torch.device("meta"):
        model = build_transformer(
            dims.infer_transformer_dims({"num_heads": 4}, files, keys), torch.float32
        )
    with pytest.raises(KeyError):
        fill_model(model, files, keys, CPU)


def test_a_cached_repository_is_used_without_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot(
        repository: str,
        *,
        allow_patterns: list[str],
        local_files_only: bool = False,
        local_dir: None = None,
    ) -> str:
        calls.append((repository, local_files_only))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert find_checkpoint(TASKS["t2v-1.3B"], area=832 * 480) == folder
    assert calls == [("Wan-AI/Wan2.1-T2V-1.3B", True)]


def test_a_half_downloaded_repository_is_completed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = folder / VAE
    content = vae.read_bytes()
    vae.unlink()

    def snapshot(
        repository: str,
        *,
        allow_patterns: list[str],
        local_files_only: bool = False,
        local_dir: None = None,
    ) -> str:
        if not local_files_only:
            vae.write_bytes(content)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert (
        open_checkpoint(find_checkpoint(TASKS["t2v-1.3B"], area=832 * 480), torch.float32).folder
        == folder
    )


def test_offline_says_which_folder_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(InputError) as caught:
        find_checkpoint(TASKS["t2v-14B"], area=832 * 480)
    assert "hf download Wan-AI/Wan2.1-T2V-14B --local-dir FOLDER" in str(caught.value)
    assert "ckpt_dir=FOLDER" in str(caught.value)


def test_each_size_has_its_checkpoint() -> None:
    task = TASKS["i2v-14B"]
    assert task.choose_repository(832 * 480) == "Wan-AI/Wan2.1-I2V-14B-480P"
    assert task.choose_repository(1280 * 720) == "Wan-AI/Wan2.1-I2V-14B-720P"
    assert TASKS["t2v-A14B"].choose_repository(832 * 480) == "Wan-AI/Wan2.2-T2V-A14B"


@pytest.mark.parametrize("num_readers", [1, 3])
def test_readers_stop_at_the_first_error(num_readers: int) -> None:
    begun: list[int] = []

    def read(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise InputError("damaged")
        time.sleep(0.01)

    with pytest.raises(InputError, match="damaged"):
        run_readers([partial(read, number) for number in range(100)], CPU, num_readers=num_readers)
    assert len(begun) < 20


def test_several_readers_fill_a_model_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    component = open_any_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32)
    alone = component.transformers[0].load(CPU).state_dict()
    monkeypatch.setattr(
        "wan_dist.weights.load.run_readers",
        lambda tasks, device: run_readers(tasks, device, num_readers=4),
    )
    together = component.transformers[0].load(CPU)
    assert not any(parameter.requires_grad for parameter in together.parameters())
    for name, value in together.state_dict().items():
        assert torch.equal(value, alone[name]), name


def test_a_module_that_a_thread_is_importing_has_no_sharded_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("without DTensor yet"))
    assert not _is_sharded(torch.zeros(1))
