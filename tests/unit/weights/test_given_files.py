"""Files that settings name, ComfyUI's folder, and the tokenizer that no folder has."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, golden_folder
from tests.weight_files import (
    TRANSFORMER_FILE,
    WHOLE,
    make_comfyui_folder,
    rename_umt5,
    scale_to_fp8,
    write_gguf,
)
from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS, decode_rows
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights import tokenizer_files
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.download_patterns import list_download_patterns
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.layout import (
    IMAGE_ENCODER_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
)

CPU = torch.device("cpu")
T2V = TASKS["t2v-1.3B"]


def open_models(folder: Path | None, files: Mapping[str, Path] | None = None) -> Checkpoint:
    given = {setting: [path] for setting, path in (files or {}).items()}
    return open_checkpoint(folder, T2V, torch.float32, given_files=given)


@pytest.fixture(scope="module", params=["fp8", "gguf"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return make_comfyui_folder(
        tmp_path_factory.mktemp(request.param), is_gguf=request.param == "gguf"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_comfyui_folder(tmp_path_factory.mktemp("comfy"), is_gguf=False)[0]


@pytest.fixture
def copied(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models, tmp_path / "models"))


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    components = (
        checkpoint.transformers[0],
        checkpoint.context_projections[0],
        checkpoint.text_encoder,
        checkpoint.vae,
    )
    return {
        f"{number} {name}": value
        for number, component in enumerate(components)
        for name, value in component.load(CPU).named_parameters()
    }


def test_a_folder_of_comfyui_is_a_checkpoint(folders: tuple[Path, Path]) -> None:
    models, plain = folders
    found, expected = weights_of(open_models(models)), weights_of(open_models(plain))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_rows_of_the_embedding_are_read_alone(folders: tuple[Path, Path]) -> None:
    encoders = [open_models(folder).text_encoder for folder in folders]
    rows, expected = (
        encoder.read_parameter_rows("embed_tokens.weight", [3, 100, 3]) for encoder in encoders
    )
    assert len(rows) == 3
    torch.testing.assert_close(rows, expected)


def test_all_files_may_lie_anywhere(models: Path, tmp_path: Path) -> None:
    """Whatever their names; the tokenizer is then that of the text encoder's file, or of the cache."""
    sources = {"dit_file": "diffusion_models", "t5_file": "text_encoders", "vae_file": "vae"}
    files = {}
    for number, (setting, name) in enumerate(sources.items()):
        (path,) = (models / name).glob("*.safetensors")
        files[setting] = Path(shutil.copy(path, tmp_path / f"{number}.ckpt"))
    shutil.copy(models / "diffusion_models/config.json", tmp_path)
    tensors = load_file(files["t5_file"])
    tensors["spiece_model"] = _sentencepiece_model()
    save_file(tensors, files["t5_file"])
    checkpoint = open_models(None, files)
    assert checkpoint.folder == tmp_path
    assert checkpoint.digest != open_models(models).digest
    expected = weights_of(open_models(models))
    for name, value in weights_of(checkpoint).items():
        assert torch.equal(value, expected[name])


GIVEN = {
    "dit_file": ("a transformer", WHOLE / TRANSFORMER_FILE),
    "t5_file": ("a umT5 text encoder", WHOLE / TEXT_ENCODER_FILE),
    "vae_file": ("a VAE", WHOLE / "Wan2.1_VAE.pth"),
}


@pytest.mark.parametrize("setting", GIVEN)
@pytest.mark.parametrize("given", GIVEN)
def test_a_file_for_another_setting_is_named_as_what_it_is(setting: str, given: str) -> None:
    kind, path = GIVEN[given]
    if setting == given:
        open_models(WHOLE, {setting: path})
        return
    with pytest.raises(InputError, match=rf"^{setting}=.* is {kind}; use {given}= for it"):
        open_models(WHOLE, {setting: path})


OTHERS = [
    ("audio_proj.audio_proj_glob_1.layer.weight", "HuMo"),
]


@pytest.mark.parametrize(("key", "name"), OTHERS)
def test_transformers_of_other_tasks_are_named(key: str, name: str, tmp_path: Path) -> None:
    save_file(load_file(WHOLE / TRANSFORMER_FILE) | {key: torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(InputError, match=rf"dit_file=.* is the transformer of .*{name}"):
        open_models(WHOLE, {"dit_file": tmp_path / "a"})


LORA_KEYS = [
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "blocks.0.self_attn.q.lora_A.default.weight",
    "transformer.blocks.0.attn1.to_q.lora.down.weight",
    "diffusion_model.blocks.0.self_attn.q.lokr_w1",
    "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
    "diffusion_model.blocks.0.norm3.diff_b",
]


@pytest.mark.parametrize("key", LORA_KEYS)
def test_a_lora_is_no_model(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"is a LoRA; use lora= for it"):
        open_models(WHOLE, {"dit_file": tmp_path / "a.safetensors"})


def test_files_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"is not a VAE: it has none of the keys of one"):
        open_models(WHOLE, {"vae_file": tmp_path / "a.safetensors"})
    t5 = {
        rename_umt5(name, 1): value
        for name, value in torch.load(WHOLE / TEXT_ENCODER_FILE, weights_only=True).items()
        if not name.startswith("blocks.1.pos_embedding")
    }
    save_file(t5, tmp_path / "t5.safetensors")  # T5 has one table for all blocks
    with pytest.raises(InputError, match=r"is not a umT5 text encoder"):
        open_models(WHOLE, {"t5_file": tmp_path / "t5.safetensors"})


def test_a_wider_patch_embedding_is_refused(tmp_path: Path) -> None:
    tensors = load_file(WHOLE / TRANSFORMER_FILE)
    tensors["patch_embedding.weight"] = torch.zeros(64, 48, 1, 2, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="48 input channels, not 16"):
        open_models(WHOLE, {"dit_file": tmp_path / "a.safetensors"})


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "modelopt", "gguf"])
def test_models_that_a_library_has_quantised_are_named(method: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WHOLE, tmp_path / "a", ignore=lambda *_: ["expected"]))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"config\.json says that .* quantised with {method}"):
        open_models(folder)


def test_one_of_several_files_must_be_named(copied: Path) -> None:
    (file,) = (copied / "vae").iterdir()
    (copied / "vae/more").mkdir()
    shutil.copy(file, copied / "vae/more/d.safetensors")
    with pytest.raises(
        InputError, match=r"several .*vae/c\.safetensors, vae/more/d\.safetensors.*vae_file=FILE"
    ):
        open_models(copied)
    found = open_models(copied, {"vae_file": copied / "vae/more/d.safetensors"})
    assert found.digest == open_models(copied, {"vae_file": file}).digest


def test_files_of_other_models_are_passed_over(copied: Path) -> None:
    shutil.copy(WHOLE / TEXT_ENCODER_FILE, copied / "vae/t5.pth")
    (copied / "vae/broken.safetensors").write_bytes(b"nothing")
    (copied / "vae/notes.txt").write_text("nothing")
    save_file({"a": torch.zeros(1)}, copied / "vae/a.safetensors")
    open_models(copied)
    (copied / "vae/c.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        open_models(copied)
    message = str(caught.value)
    for part in ("no file for t2v-1.3B", "t5.pth: a umT5 text encoder", "vae_file=FILE"):
        assert part in message
    assert re.search(r"broken\.safetensors: \(7 bytes\) has no readable", message)


def test_the_transformer_of_the_tasks_size_is_preferred(copied: Path) -> None:
    wide = {
        key: torch.zeros(
            [1536 if size == 64 else 6 * 1536 if size == 6 * 64 else size for size in value.shape],
            dtype=torch.float8_e4m3fn,
        )
        for key, value in load_file(WHOLE / TRANSFORMER_FILE).items()
        if key == "patch_embedding.weight" or key.startswith("blocks.0.")
    }
    save_file(wide, copied / "diffusion_models/wide.safetensors")
    with pytest.raises(InputError, match=r"wide\.safetensors"):  # it is chosen, and is not whole
        open_models(copied)


def test_experts_must_be_named(copied: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor tells which expert .*dit_file=HIGH,LOW"):
        open_checkpoint(copied, TASKS["t2v-A14B"], torch.float32)


def test_folders_that_are_not_there(copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    with pytest.raises(InputError, match=r"vae/ has no file for t2v-1.3B \(it is empty\)"):
        open_models(copied)


def test_heads_are_those_of_the_published_width(tmp_path: Path) -> None:
    """A config of another width is not of the file; without one, 64 columns are no heads of 128."""
    shutil.copy(WHOLE / TRANSFORMER_FILE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 5120, "num_heads": 40}))
    path = tmp_path / TRANSFORMER_FILE
    assert open_models(WHOLE, {"dit_file": path}).transformers[0].dims.num_heads == 4
    folder = Path(shutil.copytree(WHOLE, tmp_path / "a", ignore=lambda *_: ["expected"]))
    (folder / "config.json").write_text(json.dumps({"dim": 5120, "num_heads": 40}))
    with pytest.raises(InputError, match="64 wide, which is no multiple of 128"):
        open_models(folder, {"dit_file": path})


def test_what_is_given_is_not_downloaded() -> None:
    i2v = TASKS["i2v-14B"]
    whole = list_download_patterns(i2v)
    files = {setting: [Path("x")] for setting in ("dit_file", "t5_file", "vae_file", "clip_file")}
    given = list_download_patterns(i2v, files)
    assert given == ["config.json", f"{TOKENIZER_FOLDER}/*"]
    assert {TEXT_ENCODER_FILE, "Wan2.1_VAE.pth", IMAGE_ENCODER_FILE} < set(whole) - set(given)


def _sentencepiece_model() -> torch.Tensor:
    return torch.tensor(list((FIXTURES / "weights/tiny.model").read_bytes()), dtype=torch.uint8)


TEXTS = json.loads((FIXTURES / "weights/tiny.json").read_text(encoding="utf-8"))
"""Texts and their ids by sentencepiece 0.2.3."""


def _encoder_with(tmp_path: Path, **extra: torch.Tensor) -> TensorFiles:
    save_file({"shared.weight": torch.zeros(2, 2), **extra}, tmp_path / "t5.safetensors")
    return TensorFiles([tmp_path / "t5.safetensors"])


def test_the_tokenizer_of_a_text_encoders_file(tmp_path: Path) -> None:
    files = _encoder_with(tmp_path, spiece_model=_sentencepiece_model())
    found = tokenizer_files.open_tokenizer(None, files)
    assert len(TEXTS) > 5
    for text, ids in TEXTS.items():
        assert found.tokenizer.encode(text).ids == ids
    assert [found.tokenizer.token_to_id(token) for token in ("<pad>", "</s>")] == [0, 1]
    assert found.source == str(tmp_path / "t5.safetensors")
    again = tokenizer_files.open_tokenizer(None, files)
    assert again.digests == found.digests
    assert again.digests != (hashlib.sha256(b"").hexdigest(),)


def test_the_tokenizer_of_gguf(tmp_path: Path) -> None:
    model = tokenizer_files._parse_sentencepiece_model(bytes(_sentencepiece_model().tolist()))

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list([piece for piece, _ in model["pieces"]])
        writer.add_token_scores([score for _, score in model["pieces"]])
        writer.add_unk_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(0)
        writer.add_precompiled_charsmap(model["charsmap"])

    write_gguf(tmp_path / "a.gguf", {"a.weight": torch.zeros(2, 32)}, "t5encoder", add_metadata=add)
    found = tokenizer_files.open_tokenizer(None, TensorFiles([tmp_path / "a.gguf"]))
    for text, ids in TEXTS.items():
        assert found.tokenizer.encode(text).ids == ids


@pytest.mark.parametrize("content", [b"", b"not a sentencepiece model", bytes(99), b"\x0a\xff\xff"])
def test_without_a_tokenizer_one_error_says_what_to_do(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "_find_cached_folder", lambda: None)
    files = _encoder_with(tmp_path, spiece_model=torch.tensor(list(content), dtype=torch.uint8))
    with pytest.raises(
        InputError, match=r"no tokenizer is in .*t5.safetensors.*hf download google"
    ):
        tokenizer_files.open_tokenizer(None, files)
    monkeypatch.setattr(tokenizer_files, "_find_cached_folder", lambda: WHOLE / TOKENIZER_FOLDER)
    found = tokenizer_files.open_tokenizer(tmp_path / "none", files)
    assert found.source == str(WHOLE / TOKENIZER_FOLDER)


def test_the_published_tokenizer_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--google--umt5-xxl/snapshots/0123456789"
    shutil.copytree(WHOLE / TOKENIZER_FOLDER, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123456789")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert tokenizer_files._find_cached_folder() == snapshot
    (snapshot / "tokenizer.json").unlink()
    assert tokenizer_files._find_cached_folder() is None


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_are_decoded_as_llama_cpp_does(name: str) -> None:
    """Any bytes are valid blocks but for their scales in float16, which may not be finite."""
    block_format, kind = BLOCK_FORMATS[name], GgmlType[name]
    assert (block_format.num_values, block_format.num_bytes) == gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (40, 3 * block_format.num_bytes), dtype=np.uint8)
    blocks = rows.reshape(-1, block_format.num_bytes)
    halves = np.float16(generator.normal(size=(len(blocks), 2)))
    for column, offset in enumerate(_SCALE_OFFSETS.get(name, (0,))):
        blocks[:, offset : offset + 2] = halves[:, [column]].view(np.uint8)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    values = decode_rows(torch.from_numpy(rows), block_format)
    assert values.dtype == torch.float32
    assert values.shape == (40, 3 * block_format.num_values)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().max() > 1


_SCALE_OFFSETS = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def test_folded_patches_have_their_shape_from_the_metadata(tmp_path: Path) -> None:
    weights = load_file(WHOLE / TRANSFORMER_FILE)
    name = "patch_embedding.weight"
    folded = weights | {name: weights[name].reshape(-1, 2)}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(weights[name].shape))

    write_gguf(tmp_path / "a.gguf", folded, add_metadata=add)
    files = TensorFiles([tmp_path / "a.gguf"])
    assert files.shapes[name] == tuple(weights[name].shape)
    torch.testing.assert_close(
        files.read_values(name, 5, 9, CPU).float(), weights[name][5:9], rtol=1e-3, atol=1e-3
    )
    open_models(WHOLE, {"dit_file": tmp_path / "a.gguf"})


def test_weights_in_two_types_have_two_digests(tmp_path: Path) -> None:
    """Q4_0 and IQ4_NL have blocks of one size, so the bytes may be the same."""
    from wan_dist.weights.identity import hash_weights

    data = np.random.default_rng(0).integers(0, 99, (4, 18), dtype=np.uint8)
    digests = set()
    for kind in (GgmlType.Q4_0, GgmlType.IQ4_NL):
        writer = gguf.GGUFWriter(tmp_path / kind.name, "wan")
        writer.add_tensor("a", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        digests.add(hash_weights([TensorFiles([tmp_path / kind.name])]))
    assert len(digests) == 2


def test_a_scale_that_changes_changes_the_digest(copied: Path) -> None:
    digest = open_models(copied).digest
    path = copied / "diffusion_models/a.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.ffn.0.scale_weight"] *= 1.5
    save_file(tensors, path)
    assert open_models(copied).digest != digest


def test_fp8_in_bfloat16_runs_is_rounded_once(tmp_path: Path) -> None:
    whole = load_file(WHOLE / TRANSFORMER_FILE)
    stored, values = scale_to_fp8(whole, lambda name: whole[name].dim() == 2, torch.float8_e5m2)
    save_file(stored, tmp_path / "a.safetensors")
    model = (
        open_checkpoint(
            WHOLE, T2V, torch.bfloat16, given_files={"dit_file": [tmp_path / "a.safetensors"]}
        )
        .transformers[0]
        .load(CPU)
    )
    weight = model.get_submodule("blocks.1.ffn.2").weight
    assert torch.equal(weight, values["blocks.1.ffn.2.weight"].bfloat16())


def test_the_image_encoder_of_a_task_without_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"clip_file: t2v-1.3B has no image encoder"):
        open_models(WHOLE, {"clip_file": WHOLE / "config.json"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_encoders_in_8_bits_of_pytorchs_format(dtype: torch.dtype, tmp_path: Path) -> None:
    """As LightX2V writes them, a scale for each row; CLIP's q, k and v are one matrix."""
    folder = golden_folder("wan2.1-i2v")
    files, plain = {}, Path(shutil.copytree(folder, tmp_path / "plain"))
    for setting, name in (("t5_file", TEXT_ENCODER_FILE), ("clip_file", IMAGE_ENCODER_FILE)):
        stored, values = {}, {}
        for key, value in torch.load(folder / name, weights_only=True).items():
            stored[key] = values[key] = value
            if re.search(r"(attn|ffn|mlp).*weight$", key) and value.dim() == 2:
                limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
                scale = value.float().abs().amax(1, keepdim=True) / limit
                scaled = value.float() / scale
                stored[key] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
                stored[f"{key}_scale"] = scale
                values[key] = stored[key].float() * scale
        assert len(stored) > len(values)
        files[setting] = [tmp_path / name]
        torch.save(stored, tmp_path / name)
        torch.save(values, plain / name)
    task = TASKS["i2v-14B"]
    found = open_checkpoint(folder, task, torch.float32, given_files=files)
    expected = open_checkpoint(plain, task, torch.float32)
    for name in ("text_encoder", "image_encoder"):
        models = [getattr(checkpoint, name).load(CPU) for checkpoint in (found, expected)]
        for value, wanted in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(value, wanted)


def test_what_is_not_used_is_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = golden_folder("wan2.1-i2v").parent / "files/single/clip_vision_h.safetensors"
    if not clip.exists():
        pytest.skip("the goldens are not beside this checkout")
    with caplog.at_level("INFO", logger="wan_dist"):
        open_checkpoint(
            golden_folder("wan2.1-i2v"),
            TASKS["i2v-14B"],
            torch.float32,
            given_files={"clip_file": [clip]},
        )
    (line,) = [text for text in caplog.messages if text.startswith("unused")]
    assert "visual_projection" in line
    assert "vision_model.post_layernorm" in line
    caplog.clear()
    with caplog.at_level("INFO", logger="wan_dist"):
        open_models(copied)
    assert not [text for text in caplog.messages if text.startswith("unused")]


def test_a_clip_tower_is_named() -> None:
    path = golden_folder("wan2.1-i2v") / IMAGE_ENCODER_FILE
    with pytest.raises(InputError, match=r"is a CLIP vision tower; use clip_file= for it"):
        open_models(WHOLE, {"vae_file": path})


@pytest.fixture(scope="module")
def combined(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's files in one: the transformer is cast to fp8, and the text encoder has scales."""
    transformer = {
        key: value.to(torch.float8_e4m3fn) if key.endswith("ffn.0.weight") else value
        for key, value in load_file(WHOLE / TRANSFORMER_FILE).items()
    }
    encoder = load_file(next((models / "text_encoders").glob("*.safetensors")))
    encoder_prefix = "text_encoders.umt5xxl.transformer."
    tensors = {f"model.diffusion_model.{key}": value for key, value in transformer.items()}
    tensors |= {f"{encoder_prefix}{key}": value for key, value in encoder.items()}
    tensors |= {
        f"vae.{key}": value for key, value in load_file(models / "vae/c.safetensors").items()
    }
    del tensors[f"{encoder_prefix}spiece_model"]
    tensors["text_encoders.spiece_model"] = _sentencepiece_model()
    tensors["text_encoders.umt5xxl.logit_scale"] = torch.tensor(4.6)  # which no text encoder needs
    folder = tmp_path_factory.mktemp("combined")
    save_file(tensors, folder / "all.safetensors")
    save_file(transformer, folder / "transformer.safetensors")
    shutil.copy(WHOLE / "config.json", folder)
    return folder / "all.safetensors"


def test_models_are_read_from_a_file_of_all(combined: Path, models: Path) -> None:
    alone = {"dit_file": combined.with_name("transformer.safetensors")}
    alone["t5_file"] = next((models / "text_encoders").glob("*.safetensors"))
    found = open_models(None, dict.fromkeys(("dit_file", "t5_file", "vae_file"), combined))
    assert found.tokenizer.encode(next(iter(TEXTS))).ids == next(iter(TEXTS.values()))
    expected = open_models(models, alone)
    values, expected_values = weights_of(found), weights_of(expected)
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        assert torch.equal(value, expected_values[name]), name
    assert found.vae_digest == expected.vae_digest
    transformer_alone = open_models(models, {"dit_file": combined}).transformers[0]
    assert transformer_alone.dims == expected.transformers[0].dims


def test_what_a_file_of_all_does_not_hold_is_named(combined: Path, tmp_path: Path) -> None:
    tensors = load_file(combined)
    for key in [key for key in tensors if key.startswith("vae.")]:
        del tensors[key]
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(
        InputError,
        match=r"vae_file=.* holds a transformer and a text encoder in one file, and not a VAE; "
        r"it can be given as dit_file=, t5_file=, and a VAE in a file",
    ):
        open_models(WHOLE, {"vae_file": tmp_path / "two.safetensors"})
    with pytest.raises(InputError, match=r"ckpt_dir=.* is a file; .*dit_file=.*t5_file="):
        open_models(combined)


def test_quantised_modules_of_a_file_of_all_are_found_in_its_header(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "model.diffusion_model.m.weight_scale": torch.tensor(0.5),
        "vae.m.weight": torch.ones(4, 4),
    }
    for format_name in ("float8_e4m3fn", "float8_e5m2"):
        layers = {"model.diffusion_model.m": {"format": format_name}}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        save_file(tensors, tmp_path / f"{format_name}.safetensors", metadata)
    files = TensorFiles([tmp_path / "float8_e4m3fn.safetensors"], setting="dit_file")
    assert list(files.shapes) == ["m.weight"]
    assert torch.equal(files.read_values("m.weight", 0, 4, CPU), torch.full((4, 4), 0.5))
    with pytest.raises(InputError, match="said to be float8_e5m2"):
        TensorFiles([tmp_path / "float8_e5m2.safetensors"], setting="dit_file")
    others = TensorFiles([tmp_path / "float8_e5m2.safetensors"], setting="vae_file")
    assert list(others.shapes) == ["m.weight"]
