"""The Diffusers layout at full size: our key maps against the models of diffusers and transformers
themselves, on meta.
"""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from bench.peers import diffusers_config
from tests.conftest import FIXTURES
from tests.unit.weights.test_checkpoint import TRANSFORMERS, models_of, transformer
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import LATENT_MEAN, LATENT_STD, WanVae
from wan_dist.tasks.registry import TASKS
from wan_dist.weights import checkpoint_dims as dims
from wan_dist.weights import key_maps as names
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.load import check_keys

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    from diffusers import (
        AutoencoderKLWan,
        WanAnimateTransformer3DModel,
        WanTransformer3DModel,
        WanVACETransformer3DModel,
    )


class FilesOf(TensorFiles):
    """The keys and shapes that a model would be saved with."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = (Path(type(model).__name__),)
        self.non_float_types: dict[str, str] = {}
        self.shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}


def check(
    model: nn.Module, config: dict, read: Callable, build: Callable, key_map: Callable
) -> object:
    """Check that our model takes exactly what theirs is made of; returns the hyperparameters read off it."""
    files = FilesOf(model)
    keys = key_map(files.shapes)
    found = read(config, files, keys)
    with torch.device("meta"):
        check_keys(models_of(build(found)), files, keys)
    return found


@pytest.mark.parametrize(("manifest", "task"), TRANSFORMERS.items())
def test_transformers(manifest: str, task: str) -> None:
    shape = TASKS[task].transformer_dims
    assert shape is not None
    config = diffusers_config(shape)
    if shape.vace_layers:
        config |= {"vace_layers": list(shape.vace_layers), "vace_in_channels": shape.vace_in_dim}
    model_class = WanVACETransformer3DModel if shape.vace_layers else WanTransformer3DModel
    if shape.face_layers:
        model_class = WanAnimateTransformer3DModel
        accepted = inspect.signature(model_class.__init__).parameters
        config = {key: value for key, value in config.items() if key in accepted}
    with torch.device("meta"):
        model = model_class(**config)
    found = check(
        model, config, dims.infer_transformer_dims, transformer, names.map_diffusers_transformer
    )
    assert vars(found).items() >= vars(shape).items()


@pytest.mark.parametrize(
    ("manifest", "config"),
    [
        ("vae-2.1", {}),
        (
            "vae-2.2",
            {
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "latents_mean": LATENT_MEAN[48],
                "latents_std": LATENT_STD[48],
            },
        ),
    ],
)
def test_vaes(manifest: str, config: dict) -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    assert tuple(model.config.latents_mean) == LATENT_MEAN[model.config.z_dim]
    assert tuple(model.config.latents_std) == LATENT_STD[model.config.z_dim]
    check(model, {}, dims.infer_vae_dims, WanVae, names.map_diffusers_vae)
    published = json.loads((FIXTURES / f"manifests/{manifest}.json").read_text())["num_params"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("drop", [(), ("shared.weight",), ("encoder.embed_tokens.weight",)])
def test_umt5(drop: tuple[str, ...]) -> None:
    """Published folders hold the token embedding under one name, the other, or both."""
    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    files = FilesOf(model)
    files.shapes.setdefault("encoder.embed_tokens.weight", files.shapes["shared.weight"])
    for key in drop:
        del files.shapes[key]
    keys = names.map_diffusers_text_encoder(files.shapes)
    found = dims.infer_text_encoder_dims({}, files, keys)
    assert (found.num_layers, found.num_heads, found.head_dim, found.vocab_size) == (
        24,
        64,
        64,
        256384,
    )
    with torch.device("meta"):
        check_keys([build_text_encoder(found, torch.bfloat16)], files, keys)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip(prefix: str) -> None:
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    files = FilesOf(model)
    files.shapes = {
        prefix + key.removeprefix("vision_model."): shape for key, shape in files.shapes.items()
    }
    keys = names.map_diffusers_image_encoder(files.shapes)
    found = dims.infer_image_encoder_dims(config.to_dict(), files, keys)
    assert (found.num_layers, found.num_heads, found.image_size) == (32, 16, 224)
    with torch.device("meta"):
        check_keys([build_image_encoder(found)], files, keys)
