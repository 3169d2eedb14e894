"""Key maps from our parameters to checkpoint tensors, for the two published layouts.

Our modules carry the original layout's names, except for the linears that we fuse and for the two encoders,
which are modules of the transformers library. The Diffusers layout is the original one under other names.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from wan_dist.runtime.errors import InputError
from wan_dist.weights.lora_updates import WeightUpdate
from wan_dist.weights.quantization import INT8_TILES_NAME

KeyRenamer = Callable[[str], str]


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the checkpoint, or part ``part_index`` of its rows in ``num_parts`` equal parts."""

    key: str
    part_index: int = 0
    num_parts: int = 1
    update: WeightUpdate | None = None
    """The update that LoRAs add to it."""


@dataclass(frozen=True)
class KeyMap:
    """Where the parameters of one model are in a checkpoint, by their names in our modules."""

    find_sources: Callable[[str], tuple[TensorSource, ...]]
    """From a parameter's name to the tensors that it consists of, stacked along the first dim."""
    is_ignored: Callable[[str], bool] = lambda key: False
    """Which of the checkpoint's keys are known not to be needed."""


_RenameTable = tuple[tuple[str, str], ...]


def _apply_rename_table(name: str, table: _RenameTable) -> str:
    """Apply the first row (pattern, replacement) whose pattern matches the start of the name."""
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _keep_name(name: str) -> str:
    return name


_INJECTOR_TABLE: _RenameTable = (
    (r"(?:blocks\.\d+\.)?injectors\.(\d+)\.adain\.", r"audio_injector.injector_adain_layers.\1."),
    (r"(?:blocks\.\d+\.)?injectors\.(\d+)\.", r"audio_injector.injector.\1."),
)
"""Layers that add audio, which are two lists of their own in checkpoints."""


def _map_transformer(
    rename_key: KeyRenamer, keys: Collection[str], *, is_face_kv_split: bool = False
) -> KeyMap:
    """Return a transformer's key map, given how to rename the keys of the original layout.

    q, k, v of self-attention and k, v of cross-attention are one linear here, and separate in checkpoints.
    Weights that TurboDiffusion has quantised are under names of their own among ``keys``.
    ``is_face_kv_split``: so are k and v of Animate's face adapter, which the original layout has as one.
    """
    fused_linears = {
        ".self_attn.qkv.": ("self_attn.q", "self_attn.k", "self_attn.v"),
        ".cross_attn.kv.": ("cross_attn.k", "cross_attn.v"),
        ".cross_attn.kv_img.": ("cross_attn.k_img", "cross_attn.v_img"),
    }
    if is_face_kv_split:
        fused_linears[".linear1_kv."] = ("linear1_k", "linear1_v")

    def find_source(name: str) -> TensorSource:
        key = rename_key(_apply_rename_table(name, _INJECTOR_TABLE))
        key = key.replace(".proj_l.", ".attn_op.local_attn.proj_l.")
        quantized_key = f"{key.removesuffix('weight')}{INT8_TILES_NAME}"
        return TensorSource(quantized_key if quantized_key in keys else key)

    def find_sources(name: str) -> tuple[TensorSource, ...]:
        for fused_name, part_names in fused_linears.items():
            if fused_name in name:
                prefix, suffix = name.split(fused_name)
                return tuple(find_source(f"{prefix}.{part}.{suffix}") for part in part_names)
        return (find_source(name),)

    return KeyMap(find_sources, lambda key: BLUR_KERNEL_PATTERN.search(key) is not None)


BLUR_KERNEL_PATTERN = re.compile(r"(?:^|\.)motion_encoder\..*\.kernel$")
"""Constants of Animate's motion encoder, which some files have."""
_MOTION_CONVS = r"motion_encoder\.enc\.net_app\.convs\."


def _map_diffusers_name(name: str) -> str:
    """Return the Diffusers layout's name of a transformer's tensor."""
    if match := re.match(_MOTION_CONVS + r"(\d+)\.(conv[12]|skip)\.\d\.(weight|bias)", name):
        conv = "conv_skip" if match[2] == "skip" else match[2]
        attribute = "act_fn.bias" if match[3] == "bias" else "weight"
        return f"motion_encoder.res_blocks.{int(match[1]) - 1}.{conv}.{attribute}"
    return _apply_rename_table(name, _DIFFUSERS_TRANSFORMER_TABLE)


_DIFFUSERS_TRANSFORMER_TABLE: _RenameTable = (
    (r"text_embedding\.0\.", r"condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", r"condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", r"condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", r"condition_embedder.time_embedder.linear_2."),
    (r"time_embedding_r\.0\.", r"condition_embedder.time_embedder_r.linear_1."),
    (r"time_embedding_r\.2\.", r"condition_embedder.time_embedder_r.linear_2."),
    (r"time_projection\.1\.", r"condition_embedder.time_proj."),
    (r"img_emb\.proj\.0\.", r"condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", r"condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", r"condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", r"condition_embedder.image_embedder.norm2."),
    (r"img_emb\.emb_pos", r"condition_embedder.image_embedder.pos_embed"),
    (r"((?:vace_)?blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"((?:vace_)?blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"((?:vace_)?blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"((?:vace_)?blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"((?:vace_)?blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"((?:vace_)?blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"((?:vace_)?blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"((?:vace_)?blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"((?:vace_)?blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"((?:vace_)?blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"((?:vace_)?blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"((?:vace_)?blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"(vace_blocks\.\d+)\.before_proj\.", r"\1.proj_in."),
    (r"(vace_blocks\.\d+)\.after_proj\.", r"\1.proj_out."),
    (_MOTION_CONVS + r"0\.0\.weight", r"motion_encoder.conv_in.weight"),
    (_MOTION_CONVS + r"0\.1\.bias", r"motion_encoder.conv_in.act_fn.bias"),
    (_MOTION_CONVS + r"\d+\.weight", r"motion_encoder.conv_out.weight"),
    (r"motion_encoder\.enc\.fc\.", r"motion_encoder.motion_network."),
    (r"motion_encoder\.dec\.direction\.weight", r"motion_encoder.motion_synthesis_weight"),
    (r"face_encoder\.(conv1_local|conv2|conv3)\.conv\.", r"face_encoder.\1."),
    (r"face_adapter\.fuser_blocks\.(\d+)\.linear1_([qkv])\.", r"face_adapter.\1.to_\2."),
    (r"face_adapter\.fuser_blocks\.(\d+)\.linear2\.", r"face_adapter.\1.to_out."),
    (r"face_adapter\.fuser_blocks\.(\d+)\.([qk])_norm\.", r"face_adapter.\1.norm_\2."),
    (r"head\.head\.", r"proj_out."),
    (r"head\.modulation", r"scale_shift_table"),
)


def map_original_transformer(keys: Collection[str]) -> KeyMap:
    """Key map of the transformer in the original layout."""
    return _map_transformer(_keep_name, keys)


def _map_animate_2_name(name: str) -> str:
    """Return the name of a tensor in the release of Animate-2, whose blocks are wrapped in others."""
    return re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.block.", name)


_SINGLE_FILE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
"""Of ComfyUI, and of rCM."""


def map_single_file_transformer(keys: Collection[str]) -> KeyMap:
    """Key map of a transformer in a single file: names of either layout, with or without a prefix."""
    prefix = next(
        (prefix for prefix in _SINGLE_FILE_PREFIXES if any(key.startswith(prefix) for key in keys)),
        "",
    )
    is_diffusers = any(key.startswith(f"{prefix}condition_embedder.") for key in keys)
    rename = _map_diffusers_name if is_diffusers else _keep_name
    if any(key.startswith(f"{prefix}blocks.0.block.") for key in keys):
        rename = _map_animate_2_name
    return _map_transformer(lambda name: prefix + rename(name), keys, is_face_kv_split=is_diffusers)


def map_diffusers_transformer(keys: Collection[str]) -> KeyMap:
    """Key map of the transformer in the Diffusers layout."""
    return _map_transformer(_map_diffusers_name, keys, is_face_kv_split=True)


def add_updates(key_map: KeyMap, updates: Mapping[str, WeightUpdate]) -> KeyMap:
    """Return a transformer's key map with updates of its tensors, which have their original names there."""
    find_original_sources = map_original_transformer(()).find_sources

    def find_sources(name: str) -> tuple[TensorSource, ...]:
        sources, original_sources = key_map.find_sources(name), find_original_sources(name)
        if len(sources) != len(original_sources):  # k and v of the face adapter
            if updates.keys() & {source.key for source in original_sources}:
                raise InputError(
                    f"a LoRA changes {original_sources[0].key}, which this checkpoint has in "
                    "two parts; use a checkpoint in the original layout"
                )
            return sources
        return tuple(
            replace(source, update=updates.get(original_source.key))
            for source, original_source in zip(sources, original_sources, strict=True)
        )

    return replace(key_map, find_sources=find_sources)


_DIFFUSERS_VAE_TABLE: _RenameTable = (
    (r"conv1\.", r"quant_conv."),
    (r"conv2\.", r"post_quant_conv."),
    (r"(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    # VAE 2.2 has stages
    (
        r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(?=resample|time_conv)",
        r"encoder.down_blocks.\1.downsampler.",
    ),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (
        r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(?=resample|time_conv)",
        r"decoder.up_blocks.\1.upsampler.",
    ),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    # VAE 2.1 does not
    (r"encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
)
_DIFFUSERS_VAE_LAYER_NAMES = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)


def map_original_vae(_: Collection[str]) -> KeyMap:
    """Key map of either VAE in the original layout."""
    return KeyMap(lambda name: (TensorSource(name),))


def map_diffusers_vae(_: Collection[str]) -> KeyMap:
    """Key map of either VAE in the Diffusers layout."""

    def rename_key(name: str) -> str:
        # The decoder of VAE 2.1 is a flat list: three residual blocks and an upsampling for each stage.
        if match := re.match(r"decoder\.upsamples\.(\d+)\.(?!upsamples)", name):
            stage, position = divmod(int(match[1]), 4)
            layer_name = f"resnets.{position}" if position < 3 else "upsamplers.0"
            name = f"decoder.up_blocks.{stage}.{layer_name}.{name[match.end() :]}"
        else:
            name = _apply_rename_table(name, _DIFFUSERS_VAE_TABLE)
        for ours, theirs in _DIFFUSERS_VAE_LAYER_NAMES:
            name = name.replace(ours, theirs)
        return name

    return KeyMap(lambda name: (TensorSource(rename_key(name)),))


_ORIGINAL_UMT5_TABLE: _RenameTable = (
    (r"embed_tokens\.", r"token_embedding."),
    (r"final_layer_norm\.", r"norm."),
    (r"block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (
        r"block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (r"block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)


def map_original_text_encoder(_: Collection[str]) -> KeyMap:
    """Key map of umT5 in the original layout: transformers' names to Wan's."""
    return KeyMap(lambda name: (TensorSource(_apply_rename_table(name, _ORIGINAL_UMT5_TABLE)),))


def map_diffusers_text_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of umT5 in the Diffusers layout, which stores the token embedding under one name or two."""
    embedding_names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding_key = embedding_names[0] if embedding_names[0] in keys else embedding_names[1]
    return KeyMap(
        lambda name: (
            TensorSource(embedding_key if name == "embed_tokens.weight" else f"encoder.{name}"),
        ),
        lambda key: key in embedding_names,
    )


_LLAMA_UMT5_TABLE: _RenameTable = (
    (r"embed_tokens\.", r"token_embd."),
    (r"final_layer_norm\.", r"enc.output_norm."),
    (r"block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
    (r"block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
    (
        r"block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"enc.blk.\1.attn_rel_b.",
    ),
    (r"block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"enc.blk.\1.ffn_up."),
    (r"block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
)


def map_single_file_text_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of umT5 in a single file, with the names of Wan, of transformers or of llama.cpp."""
    if "token_embd.weight" in keys:
        return KeyMap(lambda name: (TensorSource(_apply_rename_table(name, _LLAMA_UMT5_TABLE)),))
    if "token_embedding.weight" in keys:
        return map_original_text_encoder(keys)
    key_map = map_diffusers_text_encoder(keys)
    # The tokenizer, in ComfyUI's files.
    return KeyMap(
        key_map.find_sources, lambda key: key == "spiece_model" or key_map.is_ignored(key)
    )


def map_single_file_vae(keys: Collection[str]) -> KeyMap:
    """Key map of a VAE in a single file, in either layout."""
    return map_original_vae(keys) if "conv2.weight" in keys else map_diffusers_vae(keys)


_ORIGINAL_CLIP_TABLE: _RenameTable = (
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


def _find_last_layer(keys: Collection[str], pattern: str) -> int:
    return max(
        (int(match[1]) for match in (re.search(pattern, key) for key in keys) if match), default=-1
    )


def map_original_image_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of CLIP in the original layout; the text tower and layers after the penultimate are ignored."""
    last_layer = _find_last_layer(keys, r"^visual\.transformer\.(\d+)\.")
    unused_prefixes = (
        "textual.",
        "log_scale",
        "visual.head",
        "visual.post_norm.",
        f"visual.transformer.{last_layer}.",
    )

    def find_sources(name: str) -> tuple[TensorSource, ...]:
        key = _apply_rename_table(name, _ORIGINAL_CLIP_TABLE)
        part_match = re.search(r"\.([qkv])_proj\.", name)
        return (
            TensorSource(key, "qkv".index(part_match[1]), 3) if part_match else TensorSource(key),
        )

    return KeyMap(find_sources, lambda key: key.startswith(unused_prefixes))


def map_diffusers_image_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of CLIP in the Diffusers layout.

    Releases of transformers differ in whether names begin with ``vision_model.``.
    """
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in keys) else ""
    last_layer = _find_last_layer(keys, r"encoder\.layers\.(\d+)\.")
    unused_prefixes = (
        f"{prefix}post_layernorm.",
        f"{prefix}encoder.layers.{last_layer}.",
        f"{prefix}embeddings.position_ids",
        "visual_projection.",
    )
    return KeyMap(
        lambda name: (TensorSource(prefix + name),), lambda key: key.startswith(unused_prefixes)
    )


def map_single_file_image_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of CLIP in a single file, in either layout."""
    is_original = any(key.startswith("visual.") for key in keys)
    return map_original_image_encoder(keys) if is_original else map_diffusers_image_encoder(keys)
