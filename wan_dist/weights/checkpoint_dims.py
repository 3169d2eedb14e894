"""Hyperparameters of a checkpoint's models, inferred from tensor shapes.

Shapes cannot be wrong about the weights they belong to. Config files, which people edit, are read only for
what shapes do not show, such as the number of heads.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from wan_dist.models.dims import (
    AudioEncoderDims,
    FaceEncoderDims,
    ImageEncoderDims,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles
from wan_dist.weights.key_maps import KeyMap
from wan_dist.weights.tensor_shapes import ConfigReader, TensorShapes

_FACE_STRIDE_KEY, _FACE_STRIDE = "inject_face_latents_blocks", 5
"""How many of the transformer's blocks there are to a block of the face adapter."""
_HEAD_KEYS = ("num_heads", "num_attention_heads")
_AUDIO_KEY = "audio_inject_layers"
_PUBLISHED_AUDIO_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
"""Blocks after which the published model of 40 blocks adds audio."""
_WAV2VEC_STRIDES = (5, 2, 2, 2, 2, 2, 2)
_HEAD_DIM = 128
"""Width of a head in all published transformers."""


def _get_patch_shape(shapes: TensorShapes) -> Shape:
    """Return the shape (D, C, pt, py, px) of a transformer's patch embedding.

    rCM stores it as a linear (D, C * patch volume), whose patches are those of all published models.
    """
    shape = shapes.get_shape_of_min_rank("patch_embedding.weight", 2)
    patch = TransformerDims.patch
    if len(shape) == 2 and shape[1] % prod(patch) == 0:
        return (shape[0], shape[1] // prod(patch), *patch)
    return shapes.get_shape("patch_embedding.weight", 5)


class TransformerInputs(NamedTuple):
    """The dims that distinguish transformers of different tasks and sizes."""

    dim: int
    num_channels: int
    has_images: bool
    num_vace_channels: int
    has_camera: bool
    has_poses: bool


def infer_transformer_inputs(files: TensorFiles, key_map: KeyMap) -> TransformerInputs:
    """Return a transformer's width, its input channels, and what other inputs it has."""
    shapes = TensorShapes(files, key_map)
    dim, num_channels = _get_patch_shape(shapes)[:2]
    return TransformerInputs(
        dim,
        num_channels,
        has_images="img_emb.proj.0.weight" in shapes,
        num_vace_channels=shapes.get_size_or_zero("vace_patch_embedding.weight", rank=5, dim=1),
        has_camera="control_adapter.conv.weight" in shapes,
        has_poses="pose_patch_embedding.weight" in shapes,
    )


def select_config_entries(
    configs: Iterable[Mapping[str, Any]], files: TensorFiles, key_map: KeyMap
) -> dict[str, Any]:
    """Return the entries that tensors do not show, from the first config of this width, if any."""
    dim = infer_transformer_inputs(files, key_map).dim
    for config in configs:
        heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
        width = heads * head_dim if type(heads) is type(head_dim) is int else config.get("dim")
        if width == dim:
            entry_names = (
                *_HEAD_KEYS,
                *("eps", "text_len", "vace_layers", _FACE_STRIDE_KEY, _AUDIO_KEY),
            )
            return {key: config[key] for key in entry_names if key in config}
    return {}


def infer_transformer_dims(
    config: Mapping[str, Any], files: TensorFiles, key_map: KeyMap
) -> TransformerDims:
    """Return the dims of a transformer; the config of either layout gives the number of heads."""
    shapes, config_reader = TensorShapes(files, key_map), ConfigReader(config, files)
    dim, in_dim, *patch = _get_patch_shape(shapes)
    num_heads = config_reader.read_positive_int(
        *_HEAD_KEYS, default=0 if config else dim // _HEAD_DIM
    )
    if not num_heads or dim % (2 * num_heads):
        raise InputError(
            f"config.json beside {files} gives no number of heads that divides {dim} evenly: "
            "it is not a Wan transformer's"
            if config
            else f"{files} is {dim} wide, which is no multiple of {_HEAD_DIM}, the width of a head; "
            "if it is a Wan transformer, put its config.json beside it"
        )
    eps = config.get("eps", TransformerDims.eps)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise config_reader.make_error(f"eps={eps!r}, which is not a number from 0 to 1")
    num_layers = config_reader.read_num_layers(
        "num_layers", shapes.count_layer_indices(r"^(?:.*\.)?blocks\.(\d+)\.")
    )
    num_vace_blocks = shapes.count_layer_indices(r"^(?:.*\.)?vace_blocks\.(\d+)\.")
    return TransformerDims(
        num_layers=num_layers,
        dim=dim,
        ffn_dim=shapes.get_shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=num_heads,
        in_dim=in_dim,
        out_dim=shapes.get_shape("head.head.weight", 2)[0] // prod(patch),
        text_dim=shapes.get_shape("text_embedding.0.weight", 2)[1],
        text_len=config_reader.read_positive_int(
            "text_len", default=TransformerDims.text_len, maximum=4096
        ),
        freq_dim=shapes.get_shape("time_embedding.0.weight", 2)[1],
        patch=(patch[0], patch[1], patch[2]),
        eps=eps,
        image_dim=shapes.get_size_or_zero("img_emb.proj.0.weight", rank=1, dim=0),
        image_positions=shapes.get_size_or_zero("img_emb.emb_pos", rank=3, dim=1),
        takes_next_timestep="time_embedding_r.0.weight" in shapes,
        has_sla="blocks.0.self_attn.proj_l.weight" in shapes,
        has_vsa="blocks.0.to_gate_compress.weight" in shapes,
        vace_layers=_choose_layers(config_reader, "vace_layers", num_layers, num_vace_blocks),
        vace_in_dim=shapes.get_size_or_zero("vace_patch_embedding.weight", rank=5, dim=1),
        ref_conv_in_dim=shapes.get_size_or_zero("ref_conv.weight", rank=4, dim=1),
        camera_in_dim=shapes.get_size_or_zero("control_adapter.conv.weight", rank=4, dim=1),
        face_layers=_choose_face_layers(config_reader, shapes, num_layers),
        pose_dim=shapes.get_size_or_zero("pose_patch_embedding.weight", rank=5, dim=1),
        **_infer_audio_dims(shapes, config_reader, num_layers, dim),
    )


def _choose_face_layers(
    config_reader: ConfigReader, shapes: TensorShapes, num_layers: int
) -> tuple[int, ...]:
    """Return after which blocks those of the face adapter run: every fifth, from the first on."""
    num_face_blocks = shapes.count_layer_indices(
        r"(?:^|\.)face_adapter\.(?:fuser_blocks\.)?(\d+)\.\w"
    )
    if not num_face_blocks:
        return ()
    stride = config_reader.read_positive_int(_FACE_STRIDE_KEY, default=_FACE_STRIDE)
    if (num_face_blocks - 1) * stride >= num_layers:
        raise config_reader.make_error(
            f"{num_layers} layers, which are too few for {num_face_blocks} blocks of the face adapter "
            f"after every {stride}"
        )
    return tuple(range(0, num_face_blocks * stride, stride))


def infer_face_encoder_dims(files: TensorFiles, key_map: KeyMap) -> FaceEncoderDims | None:
    """Return the dims of Animate's motion and face encoders, None where the files have none."""
    shapes = TensorShapes(files, key_map)
    convs = "motion_encoder.enc.net_app.convs"
    if f"{convs}.0.0.weight" not in shapes:
        return None
    channels = [shapes.get_shape(f"{convs}.0.0.weight", 4)[0]]
    while (name := f"{convs}.{len(channels)}.conv2.1.weight") in shapes:
        channels.append(shapes.get_shape(name, 4)[0])
    feature_dim, motion_dim = shapes.get_shape("motion_encoder.dec.direction.weight", 2)
    out_dim, hidden_dim = shapes.get_shape("face_encoder.out_proj.weight", 2)
    return FaceEncoderDims(
        out_dim=out_dim,
        channels=tuple(channels),
        feature_dim=feature_dim,
        num_linears=shapes.count_layer_indices(
            r"motion_encoder\.(?:enc\.fc|motion_network)\.(\d+)\.weight$"
        ),
        motion_dim=motion_dim,
        hidden_dim=hidden_dim,
        num_heads=shapes.get_shape("face_encoder.conv1_local.conv.weight", 3)[0] // hidden_dim,
    )


def _infer_audio_dims(
    shapes: TensorShapes, config_reader: ConfigReader, num_layers: int, dim: int
) -> dict[str, Any]:
    """Return the dims of audio, none for a model without it."""
    num_injectors = shapes.count_layer_indices(r"(?:^|\.)audio_injector\.injector\.(\d+)\.")
    if not num_injectors:
        return {}
    is_published = (num_layers, num_injectors) == (40, len(_PUBLISHED_AUDIO_LAYERS))
    encoder = "casual_audio_encoder"
    local_width, audio_dim, _ = shapes.get_shape(f"{encoder}.encoder.conv1_local.conv.weight", 3)
    return {
        "audio_layers": _PUBLISHED_AUDIO_LAYERS
        if is_published and _AUDIO_KEY not in config_reader.entries
        else _choose_layers(config_reader, _AUDIO_KEY, num_layers, num_injectors),
        "audio_dim": audio_dim,
        "num_audio_states": shapes.get_shape(f"{encoder}.weights", 4)[1],
        "num_audio_tokens": local_width // max(1, dim // 4),
    }


def _choose_layers(
    config_reader: ConfigReader, key: str, num_layers: int, num_wanted: int
) -> tuple[int, ...]:
    """Return the blocks to which others are added: as the config says, by default evenly spaced ones."""
    if not num_wanted:
        return ()
    layers = config_reader.entries.get(key)
    if layers is None:
        return tuple(range(0, num_layers, max(1, num_layers // num_wanted)))[:num_wanted]
    is_valid = (
        isinstance(layers, list)
        and len(layers) == num_wanted
        and all(type(layer) is int and 0 <= layer < num_layers for layer in layers)
        and layers == sorted(set(layers))
    )
    if not is_valid:
        raise config_reader.make_error(
            f"{key}={layers!r}, which are not {num_wanted} increasing numbers below {num_layers}"
        )
    return tuple(layers)


def infer_vae_dims(_: Mapping[str, Any], files: TensorFiles, key_map: KeyMap) -> VaeDims:
    """Return the dims of VAE 2.1 or VAE 2.2, distinguished by its input channels."""
    shapes = TensorShapes(files, key_map)
    dim, pixel_channels = shapes.get_shape("encoder.conv1.weight", 5)[:2]
    return VaeDims(
        dim=dim,
        decoder_dim=shapes.get_shape("decoder.head.0.gamma", 4)[0],
        latent_dim=shapes.get_shape("conv2.weight", 5)[0],
        residual=pixel_channels == 12,
    )


def infer_text_encoder_dims(
    config: Mapping[str, Any], files: TensorFiles, key_map: KeyMap
) -> TextEncoderDims:
    """Return the dims of the umT5 text encoder."""
    shapes = TensorShapes(files, key_map)
    vocab_size, dim = shapes.get_shape("embed_tokens.weight", 2)
    attention_prefix = "block.0.layer.0.SelfAttention."
    num_buckets, num_heads = shapes.get_shape(
        attention_prefix + "relative_attention_bias.weight", 2
    )
    return TextEncoderDims(
        num_layers=ConfigReader(config, files).read_num_layers(
            "num_layers", shapes.count_layer_indices(r"(?:^|\.)bl(?:ocks?|k)\.(\d+)\.")
        ),
        dim=dim,
        ffn_dim=shapes.get_shape("block.0.layer.1.DenseReluDense.wi_1.weight", 2)[0],
        num_heads=num_heads,
        head_dim=shapes.get_shape(attention_prefix + "q.weight", 2)[0] // num_heads,
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )


def infer_image_encoder_dims(
    config: Mapping[str, Any], files: TensorFiles, key_map: KeyMap
) -> ImageEncoderDims:
    """Return the dims of CLIP's vision tower.

    The original layout has no config: heads are then taken to be 80 wide, and at least two.
    """
    shapes = TensorShapes(files, key_map)
    dim, _, patch, _ = shapes.get_shape("embeddings.patch_embedding.weight", 4)
    num_positions = shapes.get_shape_of_min_rank("embeddings.position_embedding.weight", 2)[-2]
    config_reader = ConfigReader(config, files)
    return ImageEncoderDims(
        num_layers=config_reader.read_num_layers(
            "num_hidden_layers",
            shapes.count_layer_indices(
                r"^(?:visual\.transformer|(?:vision_model\.)?encoder\.layers)\.(\d+)\."
            ),
        ),
        dim=dim,
        ffn_dim=shapes.get_shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=config_reader.read_positive_int("num_attention_heads", default=max(2, dim // 80)),
        patch=patch,
        image_size=patch * round((num_positions - 1) ** 0.5),
    )


def infer_audio_encoder_dims(
    config: Mapping[str, Any], files: TensorFiles, key_map: KeyMap
) -> AudioEncoderDims:
    """Return the dims of wav2vec2; raises InputError for one that normalises in another way."""
    shapes, config_reader = TensorShapes(files, key_map), ConfigReader(config, files)
    for key, expected in (("feat_extract_norm", "layer"), ("do_stable_layer_norm", True)):
        if (value := config.get(key, expected)) != expected:
            raise InputError(
                f"config.json beside {files} says {key}={value!r}; speech to video takes a wav2vec2 with "
                f"{key}={expected!r}, as wav2vec2-large-xlsr-53-english"
            )
    convs = "feature_extractor.conv_layers"
    num_convs = shapes.count_layer_indices(r"feature_extractor\.conv_layers\.(\d+)\.")
    conv_shapes = [
        shapes.get_shape(f"{convs}.{index}.conv.weight", 3) for index in range(max(1, num_convs))
    ]
    strides = config.get("conv_stride", list(_WAV2VEC_STRIDES))
    if (
        not isinstance(strides, list)
        or len(strides) != len(conv_shapes)
        or not all(type(stride) is int and 0 < stride < 1000 for stride in strides)
    ):
        raise config_reader.make_error(
            f"conv_stride={strides!r}, which are not {len(conv_shapes)} numbers above 0"
        )
    taps_key = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    dim, group_dim, taps = shapes.get_shape(taps_key, 3)
    return AudioEncoderDims(
        num_layers=config_reader.read_num_layers(
            "num_hidden_layers", shapes.count_layer_indices(r"encoder\.layers\.(\d+)\.")
        ),
        dim=dim,
        ffn_dim=shapes.get_shape("encoder.layers.0.feed_forward.intermediate_dense.weight", 2)[0],
        num_heads=config_reader.read_positive_int("num_attention_heads", default=max(1, dim // 64)),
        conv_dims=tuple(shape[0] for shape in conv_shapes),
        conv_kernels=tuple(shape[2] for shape in conv_shapes),
        conv_strides=tuple(strides),
        position_taps=taps,
        position_groups=dim // group_dim,
    )
