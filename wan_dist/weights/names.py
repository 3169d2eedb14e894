"""What the names and shapes of a published checkpoint mean: key maps from our parameters, and hyperparameters.

A key map takes the name of one of our parameters and returns the checkpoint's keys whose tensors, stacked along the first dim,
are that parameter. The layout is the original one.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from wan_dist.errors import InputError
from wan_dist.models.text_encoder import TextEncoderDims
from wan_dist.models.transformer import TransformerDims
from wan_dist.models.vae import VaeDims
from wan_dist.weights.files import Shape

KeyMap = Callable[[str], tuple[str, ...]]


def transformer_keys(name: str) -> tuple[str, ...]:
    """Key map of the transformer: linears that we fuse are stored apart."""
    for fused, parts in ((".self_attn.qkv.", "qkv"), (".cross_attn.kv.", "kv")):
        if fused in name:
            head, tail = name.split(fused)
            return tuple(f"{head}{fused[: fused.rindex('.', 0, -1)]}.{part}.{tail}" for part in parts)
    return (name,)


def vae_keys(name: str) -> tuple[str, ...]:
    """Key map of the VAE: the names are the checkpoint's."""
    return (name,)


_UMT5 = (
    (r"^embed_tokens\.", "token_embedding."),
    (r"^final_layer_norm\.", "norm."),
    (r"^block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"blocks.\1.pos_embedding.embedding."),
    (r"^block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"^block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"^block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"^block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)


def text_encoder_keys(name: str) -> tuple[str, ...]:
    """Key map of umT5: transformers' names to Wan's."""
    for pattern, replacement in _UMT5:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return (renamed,)
    return (name,)


def transformer_dims(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> TransformerDims:
    """Hyperparameters from ``config.json`` and, for what it leaves out, from the tensors' shapes."""
    keys = ("num_layers", "dim", "ffn_dim", "num_heads", "in_dim", "out_dim", "freq_dim", "text_len", "eps")
    absent = [key for key in keys if key not in config]
    if absent:
        raise InputError(f"config.json lacks {', '.join(absent)}: it is not that of a Wan transformer in the original layout")
    patch = _shape(shapes, "patch_embedding.weight")[2:]
    return TransformerDims(
        **{key: config[key] for key in keys},
        text_dim=_shape(shapes, "text_embedding.0.weight")[1],
        patch=(patch[0], patch[1], patch[2]),
    )


def vae_dims(shapes: Mapping[str, Shape]) -> VaeDims:
    """Hyperparameters from the tensors' shapes; there is no config beside the VAE."""
    return VaeDims(dim=_shape(shapes, "encoder.conv1.weight")[0], latent_dim=_shape(shapes, "conv2.weight")[0])


def text_encoder_dims(shapes: Mapping[str, Shape]) -> TextEncoderDims:
    """Hyperparameters from the tensors' shapes; there is no config beside umT5."""
    vocab_size, dim = _shape(shapes, "token_embedding.weight")
    num_buckets, num_heads = _shape(shapes, "blocks.0.pos_embedding.embedding.weight")
    return TextEncoderDims(
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        dim=dim,
        ffn_dim=_shape(shapes, "blocks.0.ffn.fc1.weight")[0],
        num_heads=num_heads,
        head_dim=_shape(shapes, "blocks.0.attn.q.weight")[0] // num_heads,
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )


def _shape(shapes: Mapping[str, Shape], key: str) -> Shape:
    if key not in shapes:
        raise InputError(f"the weights hold no {key}: they are not of the kind expected here")
    return shapes[key]
