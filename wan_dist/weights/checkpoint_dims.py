"""Hyperparameters of the models in a checkpoint, from its tensors' shapes and, for what shapes cannot tell, its config files."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from wan_dist.models.dims import ImageEncoderDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles
from wan_dist.weights.key_maps import KeyMap

_MOST_LAYERS = 256
"""Six times those of the published ones: a broken file should not have a million built."""


class _Shapes:
    """Shapes by our names, whatever the checkpoint calls the tensors."""

    def __init__(self, files: TensorFiles, keys: KeyMap) -> None:
        self.files = files
        self.keys = keys

    def of(self, name: str, rank: int) -> Shape:
        """Return a shape of so many dims; raises InputError if there is none."""
        shape = self.at_least(name, rank)
        if len(shape) != rank:
            raise self._fault(name, shape, rank)
        return shape

    def at_least(self, name: str, rank: int) -> Shape:
        """Return a shape of so many dims or more, none of them 0; raises InputError if there is none."""
        key = self.keys.sources(name)[0].key
        if key not in self.files.shapes:
            raise InputError(f"{self.files} holds no {key}: it is not of the kind expected there")
        shape = self.files.shapes[key]
        if len(shape) < rank or 0 in shape:
            raise self._fault(name, shape, rank)
        return shape

    def _fault(self, name: str, shape: Shape, rank: int) -> InputError:
        key = self.keys.sources(name)[0].key
        what = f"{self.files} holds {key} of shape {shape}, not of {rank} dims"
        return InputError(f"{what}: it is not of the kind expected there")

    def __contains__(self, name: str) -> bool:
        return self.keys.sources(name)[0].key in self.files.shapes

    def count(self, pattern: str) -> int:
        """Return how many different numbers stand in the pattern's group over all keys."""
        return len({match[1] for match in (re.search(pattern, key) for key in self.files.shapes) if match})


class _Config:
    """Entries of a config.json, which people edit."""

    def __init__(self, entries: Mapping[str, Any], files: TensorFiles) -> None:
        self.entries = entries
        self.files = files

    def number(self, *keys: str, default: int, most: int = 2**20) -> int:
        """Return the first of these entries that is there, from 1 on; raises InputError."""
        for key in keys:
            value = self.entries.get(key)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise self.fault(f"{key}={value!r}, which is not a number from 1 to {most}")
            if value is not None:
                return value
        return default

    def layers(self, key: str, stored: int) -> int:
        """Return how many layers there should be, by default as many as are stored; `check_keys` tells whether they are there."""
        return self.number(key, default=min(stored, _MOST_LAYERS), most=_MOST_LAYERS)

    def fault(self, what: str) -> InputError:
        """Return the error of an entry."""
        return InputError(f"config.json beside {self.files} says {what}; download it again")


def transformer_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> TransformerDims:
    """Hyperparameters of a transformer; the config of either layout gives the number of heads."""
    shapes, said = _Shapes(files, keys), _Config(config, files)
    dim, in_dim, *patch = shapes.of("patch_embedding.weight", 5)
    num_heads = said.number("num_heads", "num_attention_heads", default=0)
    if not num_heads or dim % (2 * num_heads):
        raise InputError(f"config.json beside {files} gives no number of heads that divides {dim} evenly: it is not a Wan transformer's")
    eps = config.get("eps", TransformerDims.eps)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise said.fault(f"eps={eps!r}, which is not a number from 0 to 1")
    return TransformerDims(
        num_layers=said.layers("num_layers", shapes.count(r"^(?:.*\.)?blocks\.(\d+)\.")),
        dim=dim,
        ffn_dim=shapes.of("blocks.0.ffn.0.weight", 2)[0],
        num_heads=num_heads,
        in_dim=in_dim,
        out_dim=shapes.of("head.head.weight", 2)[0] // prod(patch),
        text_dim=shapes.of("text_embedding.0.weight", 2)[1],
        text_len=said.number("text_len", default=TransformerDims.text_len, most=4096),
        freq_dim=shapes.of("time_embedding.0.weight", 2)[1],
        patch=(patch[0], patch[1], patch[2]),
        eps=eps,
        image_dim=shapes.of("img_emb.proj.0.weight", 1)[0] if "img_emb.proj.0.weight" in shapes else 0,
        image_positions=shapes.of("img_emb.emb_pos", 3)[1] if "img_emb.emb_pos" in shapes else 0,
    )


def vae_dims(_: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> VaeDims:
    """Hyperparameters of either VAE."""
    shapes = _Shapes(files, keys)
    dim, pixel_channels = shapes.of("encoder.conv1.weight", 5)[:2]
    return VaeDims(
        dim=dim,
        decoder_dim=shapes.of("decoder.head.0.gamma", 4)[0],
        latent_dim=shapes.of("conv2.weight", 5)[0],
        residual=pixel_channels == 12,
    )


def text_encoder_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> TextEncoderDims:
    """Hyperparameters of umT5."""
    shapes = _Shapes(files, keys)
    vocab_size, dim = shapes.of("embed_tokens.weight", 2)
    attention = "block.0.layer.0.SelfAttention."
    num_buckets, num_heads = shapes.of(attention + "relative_attention_bias.weight", 2)
    return TextEncoderDims(
        num_layers=_Config(config, files).layers("num_layers", shapes.count(r"(?:^|\.)blocks?\.(\d+)\.")),
        dim=dim,
        ffn_dim=shapes.of("block.0.layer.1.DenseReluDense.wi_1.weight", 2)[0],
        num_heads=num_heads,
        head_dim=shapes.of(attention + "q.weight", 2)[0] // num_heads,
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )


def image_encoder_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> ImageEncoderDims:
    """Hyperparameters of CLIP's vision tower; the original layout has no config: its heads are 80 wide, and two at least."""
    shapes = _Shapes(files, keys)
    dim, _, patch, _ = shapes.of("embeddings.patch_embedding.weight", 4)
    num_positions = shapes.at_least("embeddings.position_embedding.weight", 2)[-2]
    said = _Config(config, files)
    return ImageEncoderDims(
        num_layers=said.layers("num_hidden_layers", shapes.count(r"^(?:visual\.transformer|(?:vision_model\.)?encoder\.layers)\.(\d+)\.")),
        dim=dim,
        ffn_dim=shapes.of("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=said.number("num_attention_heads", default=max(2, dim // 80)),
        patch=patch,
        image_size=patch * round((num_positions - 1) ** 0.5),
    )
