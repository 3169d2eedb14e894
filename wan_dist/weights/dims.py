"""Hyperparameters of the models in a checkpoint, from its tensors' shapes and, for what shapes cannot tell, its config files."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from wan_dist.dims import ImageEncoderDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles
from wan_dist.weights.names import KeyMap


class _Shapes:
    """Shapes by our names, whatever the checkpoint calls the tensors."""

    def __init__(self, files: TensorFiles, keys: KeyMap) -> None:
        self.files = files
        self.keys = keys

    def __getitem__(self, name: str) -> Shape:
        key = self.keys.sources(name)[0].key
        if key not in self.files.shapes:
            raise InputError(f"{self.files} holds no {key}: it is not of the kind expected there")
        return self.files.shapes[key]

    def __contains__(self, name: str) -> bool:
        return self.keys.sources(name)[0].key in self.files.shapes

    def count(self, pattern: str) -> int:
        """Return how many different numbers stand in the pattern's group over all keys."""
        return len({match[1] for match in (re.search(pattern, key) for key in self.files.shapes) if match})


def transformer_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> TransformerDims:
    """Hyperparameters of a transformer; the config of either layout gives the number of heads."""
    shapes = _Shapes(files, keys)
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    num_heads = config.get("num_heads") or config.get("num_attention_heads")
    if not isinstance(num_heads, int) or dim % num_heads:
        raise InputError(f"config.json beside {files} gives no number of heads that divides {dim}: it is not a Wan transformer's")
    return TransformerDims(
        num_layers=config.get("num_layers") or shapes.count(r"^blocks\.(\d+)\."),
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=num_heads,
        in_dim=in_dim,
        out_dim=shapes["head.head.weight"][0] // prod(patch),
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=config.get("text_len", TransformerDims.text_len),
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch=(patch[0], patch[1], patch[2]),
        eps=config.get("eps", TransformerDims.eps),
        image_dim=shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else 0,
        image_positions=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
    )


def vae_dims(_: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> VaeDims:
    """Hyperparameters of either VAE."""
    shapes = _Shapes(files, keys)
    dim, pixel_channels = shapes["encoder.conv1.weight"][:2]
    return VaeDims(
        dim=dim,
        decoder_dim=shapes["decoder.head.0.gamma"][0],
        latent_dim=shapes["conv2.weight"][0],
        residual=pixel_channels == 12,
    )


def text_encoder_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> TextEncoderDims:
    """Hyperparameters of umT5."""
    shapes = _Shapes(files, keys)
    vocab_size, dim = shapes["embed_tokens.weight"]
    attention = "block.0.layer.0.SelfAttention."
    num_buckets, num_heads = shapes[attention + "relative_attention_bias.weight"]
    return TextEncoderDims(
        num_layers=config.get("num_layers") or shapes.count(r"(?:^|\.)blocks?\.(\d+)\."),
        dim=dim,
        ffn_dim=shapes["block.0.layer.1.DenseReluDense.wi_1.weight"][0],
        num_heads=num_heads,
        head_dim=shapes[attention + "q.weight"][0] // num_heads,
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )


def image_encoder_dims(config: Mapping[str, Any], files: TensorFiles, keys: KeyMap) -> ImageEncoderDims:
    """Hyperparameters of CLIP's vision tower; the original layout has no config: its heads are 80 wide, and two at least."""
    shapes = _Shapes(files, keys)
    dim, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    num_patches = shapes["embeddings.position_embedding.weight"][-2] - 1
    return ImageEncoderDims(
        num_layers=config.get("num_hidden_layers") or shapes.count(r"^(?:visual\.transformer|(?:vision_model\.)?encoder\.layers)\.(\d+)\."),
        dim=dim,
        ffn_dim=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_heads=config.get("num_attention_heads") or max(2, dim // 80),
        patch=patch,
        image_size=patch * round(num_patches**0.5),
    )
