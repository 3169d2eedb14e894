"""Where each of our parameters is in a checkpoint: key maps for the two published layouts.

Our modules carry the original layout's names, except for the linears that we fuse and for the two encoders that are transformers'
modules. The Diffusers layout is the original one under other names.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or the ``part``-th of ``parts`` equal shares of its rows."""

    key: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class KeyMap:
    """``sources`` maps the name of one of our parameters to what it consists of, stacked along the first dim."""

    sources: Callable[[str], tuple[Source, ...]]
    ignores: Callable[[str], bool] = lambda key: False
    """Which of the checkpoint's keys are known not to be needed."""


_Table = tuple[tuple[str, str], ...]


def _renamed(name: str, table: _Table) -> str:
    """Apply the first row (pattern, replacement) whose pattern begins the name."""
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _same(name: str) -> str:
    return name


def _transformer(rename: Rename) -> KeyMap:
    """q, k, v of self-attention and k, v of cross-attention are one linear here and apart in every checkpoint."""
    fused = {
        ".self_attn.qkv.": ("self_attn.q", "self_attn.k", "self_attn.v"),
        ".cross_attn.kv.": ("cross_attn.k", "cross_attn.v"),
        ".cross_attn.kv_img.": ("cross_attn.k_img", "cross_attn.v_img"),
    }

    def sources(name: str) -> tuple[Source, ...]:
        for whole, parts in fused.items():
            if whole in name:
                head, tail = name.split(whole)
                return tuple(Source(rename(f"{head}.{part}.{tail}")) for part in parts)
        return (Source(rename(name)),)

    return KeyMap(sources)


_DIFFUSERS_TRANSFORMER: _Table = (
    (r"text_embedding\.0\.", r"condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", r"condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", r"condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", r"condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", r"condition_embedder.time_proj."),
    (r"img_emb\.proj\.0\.", r"condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", r"condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", r"condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", r"condition_embedder.image_embedder.norm2."),
    (r"img_emb\.emb_pos", r"condition_embedder.image_embedder.pos_embed"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"head\.head\.", r"proj_out."),
    (r"head\.modulation", r"scale_shift_table"),
)


def original_transformer(_: Collection[str]) -> KeyMap:
    """Key map of the transformer in the original layout."""
    return _transformer(_same)


_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FP8_EXTRAS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")


def single_file_transformer(keys: Collection[str]) -> KeyMap:
    """Key map of a transformer in one file, as it is passed around: names of either layout, with or without a prefix, also in fp8."""
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    table = _DIFFUSERS_TRANSFORMER if any(key.startswith(f"{prefix}condition_embedder.") for key in keys) else ()
    return KeyMap(_transformer(lambda name: prefix + _renamed(name, table)).sources, lambda key: key.endswith(_FP8_EXTRAS))


def diffusers_transformer(_: Collection[str]) -> KeyMap:
    """Key map of the transformer in the Diffusers layout."""
    return _transformer(lambda name: _renamed(name, _DIFFUSERS_TRANSFORMER))


_DIFFUSERS_VAE_PLACES: _Table = (
    (r"conv1\.", r"quant_conv."),
    (r"conv2\.", r"post_quant_conv."),
    (r"(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    # VAE 2.2 has stages
    (r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(?=resample|time_conv)", r"encoder.down_blocks.\1.downsampler."),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(?=resample|time_conv)", r"decoder.up_blocks.\1.upsampler."),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    # VAE 2.1 does not
    (r"encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
)
_DIFFUSERS_VAE_LAYERS = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)


def original_vae(_: Collection[str]) -> KeyMap:
    """Key map of either VAE in the original layout."""
    return KeyMap(lambda name: (Source(name),))


def diffusers_vae(_: Collection[str]) -> KeyMap:
    """Key map of either VAE in the Diffusers layout."""

    def rename(name: str) -> str:
        # The decoder of VAE 2.1 is a flat list: three residual blocks, an upsampling, and again.
        if match := re.match(r"decoder\.upsamples\.(\d+)\.(?!upsamples)", name):
            stage, place = divmod(int(match[1]), 4)
            kind = f"resnets.{place}" if place < 3 else "upsamplers.0"
            name = f"decoder.up_blocks.{stage}.{kind}.{name[match.end() :]}"
        else:
            name = _renamed(name, _DIFFUSERS_VAE_PLACES)
        for ours, theirs in _DIFFUSERS_VAE_LAYERS:
            name = name.replace(ours, theirs)
        return name

    return KeyMap(lambda name: (Source(rename(name)),))


_ORIGINAL_UMT5: _Table = (
    (r"embed_tokens\.", r"token_embedding."),
    (r"final_layer_norm\.", r"norm."),
    (r"block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"blocks.\1.pos_embedding.embedding."),
    (r"block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)


def original_text_encoder(_: Collection[str]) -> KeyMap:
    """Key map of umT5 in the original layout: transformers' names to Wan's."""
    return KeyMap(lambda name: (Source(_renamed(name, _ORIGINAL_UMT5)),))


def diffusers_text_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of umT5 in the Diffusers layout, where the token embedding is stored once or, under two names, twice."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = names[0] if names[0] in keys else names[1]
    return KeyMap(
        lambda name: (Source(embedding if name == "embed_tokens.weight" else f"encoder.{name}"),),
        lambda key: key in names,
    )


_ORIGINAL_CLIP: _Table = (
    (r"embeddings\.class_embedding", r"visual.cls_embedding"),
    (r"embeddings\.position_embedding\.weight", r"visual.pos_embedding"),
    (r"embeddings\.patch_embedding\.", r"visual.patch_embedding."),
    (r"pre_layrnorm\.", r"visual.pre_norm."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual.transformer.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.", r"visual.transformer.\1.attn.to_qkv."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"visual.transformer.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"visual.transformer.\1.mlp.0."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"visual.transformer.\1.mlp.2."),
)


def _last_layer(keys: Collection[str], pattern: str) -> int:
    return max((int(match[1]) for match in (re.search(pattern, key) for key in keys) if match), default=-1)


def original_image_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of CLIP in the original layout: the text tower and what follows the penultimate layer are left."""
    last = _last_layer(keys, r"^visual\.transformer\.(\d+)\.")
    unused = ("textual.", "log_scale", "visual.head", "visual.post_norm.", f"visual.transformer.{last}.")

    def sources(name: str) -> tuple[Source, ...]:
        key = _renamed(name, _ORIGINAL_CLIP)
        part = re.search(r"\.([qkv])_proj\.", name)
        return (Source(key, "qkv".index(part[1]), 3) if part else Source(key),)

    return KeyMap(sources, lambda key: key.startswith(unused))


def diffusers_image_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of CLIP in the Diffusers layout; releases of transformers differ in whether names begin with ``vision_model.``."""
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in keys) else ""
    last = _last_layer(keys, r"encoder\.layers\.(\d+)\.")
    unused = tuple(
        prefix + name for name in ("post_layernorm.", f"encoder.layers.{last}.", "embeddings.position_ids", "visual_projection.")
    )
    return KeyMap(lambda name: (Source(prefix + name),), lambda key: key.startswith(unused))
