"""The golden checkpoint in files as ComfyUI and llama.cpp have them, and what their weights are."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import FIXTURES
from wan_dist.weights.layout import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, WEIGHTS_STEM

WHOLE = FIXTURES / "wan2.1-t2v"
TRANSFORMER_FILE = f"{WEIGHTS_STEM}.safetensors"
E4M3 = torch.float8_e4m3fn
_UMT5_NAMES = (
    (r"^token_embedding\.", "shared.", "token_embd."),
    (r"^norm\.", "encoder.final_layer_norm.", "enc.output_norm."),
    (r"norm1\.", "layer.0.layer_norm.", "attn_norm."),
    (r"norm2\.", "layer.1.layer_norm.", "ffn_norm."),
    (
        r"pos_embedding\.embedding\.",
        "layer.0.SelfAttention.relative_attention_bias.",
        "attn_rel_b.",
    ),
    (r"attn\.([qkvo])\.", r"layer.0.SelfAttention.\1.", r"attn_\1."),
    (r"ffn\.gate\.0\.", "layer.1.DenseReluDense.wi_0.", "ffn_gate."),
    (r"ffn\.fc1\.", "layer.1.DenseReluDense.wi_1.", "ffn_up."),
    (r"ffn\.fc2\.", "layer.1.DenseReluDense.wo.", "ffn_down."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1.", r"enc.blk.\1."),
)
"""Parts of umT5's names: the original ones, those of transformers and those of llama.cpp."""
_TYPES = {
    "self_attn.q": GgmlType.Q8_0,
    "self_attn.k": GgmlType.Q5_1,
    "self_attn.v": GgmlType.Q4_0,
    "cross_attn.k": GgmlType.Q4_1,
    "cross_attn.v": GgmlType.BF16,
    "ffn.0": GgmlType.Q5_0,
}


def rename_umt5(name: str, column: int) -> str:
    for row in _UMT5_NAMES:
        name = re.sub(row[0], row[column], name)
    return name


def choose_type(name: str, value: Tensor) -> GgmlType:
    """Return a type as in files that people have: matrices of the blocks quantised, vectors not."""
    if value.dim() != 2 or "pos_embedding" in name or "rel_b" in name:
        return GgmlType.F32
    if not re.search(r"^blocks\.|\.blocks\.|^enc\.blk\.|token_embd", name):
        return GgmlType.F16
    module = re.sub(r".*blocks\.\d+\.|\.weight$", "", name)
    return _TYPES.get(module, GgmlType.Q8_0)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    architecture: str = "wan",
    choose: Callable[[str, Tensor], GgmlType] = choose_type,
    add_metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, Tensor]:
    """Write a file with llama.cpp's package and return the values that it decodes from it."""
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer)
    values = {}
    for name, value in tensors.items():
        kind = choose(name, value)
        data = gguf.quants.quantize(value.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        decoded = np.array(gguf.quants.dequantize(data, kind), dtype=np.float32)
        values[name] = torch.from_numpy(decoded).view(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def scale_to_fp8(
    tensors: Mapping[str, Tensor], is_scaled: Callable[[str], bool], dtype: torch.dtype = E4M3
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return tensors as ComfyUI's scaled fp8 has them, and their values."""
    stored = {"scaled_fp8": torch.zeros(2).to(dtype)}
    values = {}
    for name, value in tensors.items():
        if not is_scaled(name):
            stored[name] = value
            values[name] = value.float()
            continue
        scale = (value.abs().amax() / torch.finfo(dtype).max).float()
        stored[name] = (value / scale).to(dtype)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
        values[name] = stored[name].float() * scale
    return stored, values


def make_comfyui_folder(folder: Path, *, is_gguf: bool) -> tuple[Path, Path]:
    """Return ComfyUI's folder of the golden checkpoint, and an original one of the same values.

    With ``is_gguf`` transformer and text encoder are GGUF, without they are scaled fp8.
    """
    models, plain = folder / "models", folder / "plain"
    for name in ("diffusion_models", "text_encoders", "vae"):
        (models / name).mkdir(parents=True)
    transformer = load_file(WHOLE / TRANSFORMER_FILE)
    encoder = torch.load(WHOLE / TEXT_ENCODER_FILE, weights_only=True)
    shutil.copytree(WHOLE, plain, ignore=shutil.ignore_patterns("expected"))
    if is_gguf:
        transformer = write_gguf(models / "diffusion_models/a.gguf", transformer)
        names = {rename_umt5(name, 2): name for name in encoder}
        values = write_gguf(
            models / "text_encoders/b.gguf",
            {key: encoder[name] for key, name in names.items()},
            "t5encoder",
        )
    else:
        stored, transformer = scale_to_fp8(transformer, lambda name: transformer[name].dim() == 2)
        save_file(stored, models / "diffusion_models/a.safetensors")
        names = {rename_umt5(name, 1): name for name in encoder}
        stored, values = scale_to_fp8(
            {key: encoder[name] for key, name in names.items()},
            lambda key: bool(re.search(r"SelfAttention\.[qkvo]\.|DenseReluDense", key)),
        )
        stored["spiece_model"] = torch.tensor(list(b"not a sentencepiece model")).byte()
        save_file(stored, models / "text_encoders/b.safetensors")
    # the golden's heads are narrower than those of the published models
    shutil.copy(WHOLE / "config.json", models / "diffusion_models")
    shutil.copytree(WHOLE / TOKENIZER_FOLDER, models / TOKENIZER_FOLDER)
    vae = torch.load(WHOLE / "Wan2.1_VAE.pth", weights_only=True)
    save_file(vae, models / "vae/c.safetensors")
    save_file(transformer, plain / TRANSFORMER_FILE)
    torch.save({names[key]: value for key, value in values.items()}, plain / TEXT_ENCODER_FILE)
    return models, plain


def json_bytes(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
