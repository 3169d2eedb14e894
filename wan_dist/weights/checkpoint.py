"""Checkpoint of a task: its models, checked when the folder is opened and loaded when needed.

Opening reads configs and headers only, so that a wrong or damaged folder is refused before weights are read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from wan_dist.config.loras import LoraSetting
from wan_dist.models.audio_encoder import build_audio_encoder
from wan_dist.models.audio_projection import AudioProjection
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import (
    AudioEncoderDims,
    FaceEncoderDims,
    ImageEncoderDims,
    ModelDims,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from wan_dist.models.face_encoder import FaceVideoEncoder, make_blur_kernel
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.planning.gguf_memory import count_compressed_blocks
from wan_dist.planning.workload import CompressedBlocks
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.gguf_header import BLOCK_SIZES
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import read_checkpoint_json
from wan_dist.tasks.base import Task
from wan_dist.weights import checkpoint_dims
from wan_dist.weights.component import Component, Model, open_component
from wan_dist.weights.gguf_parts import count_changed_weights
from wan_dist.weights.identity import hash_weights
from wan_dist.weights.key_maps import BLUR_KERNEL_PATTERN, add_updates
from wan_dist.weights.layout import NO_FILES, ComponentFiles, GivenFiles, find_layout
from wan_dist.weights.load import check_keys
from wan_dist.weights.lora import MergedLora, merge_loras
from wan_dist.weights.lora_names import list_original_shapes
from wan_dist.weights.task_match import check_transformer_task
from wan_dist.weights.tokenizer_files import open_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """The models of one folder. ``transformers``: one, or those for high and low noise, in this order."""

    folder: Path
    transformers: tuple[Component[FusedTransformer, TransformerDims], ...]
    context_projections: tuple[Component[ContextProjection, TransformerDims], ...]
    """For each transformer, from the same files: the projections to its cross-attention's keys and values."""
    text_encoder: Component[nn.Module, TextEncoderDims]
    image_encoder: Component[nn.Module, ImageEncoderDims] | None
    vae: Component[WanVae, VaeDims]
    face_encoder: Component[FaceVideoEncoder, FaceEncoderDims] | None
    """Of Animate, from the transformer's files."""
    audio_encoder: Component[nn.Module, AudioEncoderDims] | None
    audio_projection: Component[AudioProjection, TransformerDims] | None
    """Of speech to video, from the transformer's files."""
    tokenizer: Tokenizer
    tokenizer_digests: tuple[str, ...]
    """Digests of all that the tokenizer depends on."""
    loras: tuple[MergedLora, ...] = ()
    """LoRAs that are added to the transformers' weights as they are read."""

    @cached_property
    def digest(self) -> str:
        """Digest of the weights, of the dims (some cannot be inferred from weights) and of the tokenizer.

        Of the weights as they are used, with the LoRAs in their order.
        """
        components = (
            *self.transformers,
            *(self.text_encoder, self.vae, self.image_encoder, self.audio_encoder),
        )
        weights_digest = hash_weights(
            component.files for component in components if component is not None
        )
        component_dims = [component.dims for component in components if component is not None]
        depends_on: tuple[object, ...] = (
            weights_digest,
            component_dims,
            list(self.tokenizer_digests),
        )
        if vace_layers := self.transformers[0].dims.vace_layers:
            depends_on += (vace_layers,)
        if face_layers := self.transformers[0].dims.face_layers:
            depends_on += (face_layers,)
        if audio_layers := self.transformers[0].dims.audio_layers:
            depends_on += (audio_layers,)
        if self.loras:
            depends_on += ([lora.file.digest for lora in self.loras],)
        return hashlib.sha256(repr(depends_on).encode()).hexdigest()

    @cached_property
    def text_encoder_digest(self) -> str:
        """Digest of the text encoder's weights and of its tokenizer."""
        return " ".join([hash_weights([self.text_encoder.files]), *self.tokenizer_digests])

    @cached_property
    def vae_digest(self) -> str:
        """Digest of the VAE's weights alone."""
        return hash_weights([self.vae.files])

    @cached_property
    def image_encoder_digest(self) -> str:
        """Digest of the image encoder's weights alone, empty without one."""
        return "" if self.image_encoder is None else hash_weights([self.image_encoder.files])

    @cached_property
    def compressed_blocks(self) -> CompressedBlocks | None:
        """What the transformers' blocks take if their weights stay in GGUF's blocks; None if none can."""
        tensors_by_expert = [
            {
                key: (shape, part.files.get_type_name(key))
                for key, shape in part.files.shapes.items()
            }
            for part in self.transformers
        ]
        types = {type_name for tensors in tensors_by_expert for _, type_name in tensors.values()}
        if types.isdisjoint(BLOCK_SIZES):
            return None
        with torch.device("meta"):
            models = [transformer.build_model() for transformer in self.transformers]
        num_changed = sum(
            count_changed_weights(model.layers(), part.files, part.key_map)
            for model, part in zip(models, self.transformers, strict=True)
        )
        itemsize = models[0].dtype.itemsize
        return count_compressed_blocks(
            tensors_by_expert, self.transformers[0].dims, itemsize, num_changed
        )

    def check_compression(self) -> None:
        """Raise InputError unless weights of a transformer can stay in GGUF's blocks."""
        if self.compressed_blocks is None:
            raise InputError(
                f"memory.gguf=compressed needs a GGUF file with weights in blocks, as Q4_K, which "
                f"{self.transformers[0].files} is not; give one as dit_file, or leave memory.gguf out"
            )

    @property
    def model_dims(self) -> ModelDims:
        """Dims of the models."""
        return ModelDims(
            transformer=self.transformers[0].dims,
            text_encoder=self.text_encoder.dims,
            image_encoder=None if self.image_encoder is None else self.image_encoder.dims,
            face_encoder=None if self.face_encoder is None else self.face_encoder.dims,
            audio_encoder=None if self.audio_encoder is None else self.audio_encoder.dims,
            vae=self.vae.dims,
        )


def open_checkpoint(
    folder: Path | None,
    task: Task,
    dtype: torch.dtype,
    *,
    given_files: GivenFiles = NO_FILES,
    loras: Sequence[LoraSetting] = (),
    allow_unmatched: bool = False,
) -> Checkpoint:
    """Open a folder in any layout; every file is checked against its model, no weights are read.

    ``given_files`` hold models' weights instead of the folder's, by the settings that name them;
    ``folder`` may be None where all are given. ``loras`` are added to the transformers' weights, with
    ``allow_unmatched`` also those that are made for more modules than there are. Raises InputError for what
    is missing, damaged, or of another model or task.
    """
    layout = find_layout(folder, task, given_files)
    transformer_pairs = [
        open_transformer(part, dtype, layout.transformer_configs) for part in layout.transformers
    ]
    text_encoder = open_component(
        layout.text_encoder,
        checkpoint_dims.infer_text_encoder_dims,
        lambda dims: build_text_encoder(dims, dtype),
    )
    image_encoder = None
    if layout.image_encoder is not None:
        image_encoder = open_component(
            layout.image_encoder, checkpoint_dims.infer_image_encoder_dims, build_image_encoder
        )
    audio_encoder = None
    if layout.audio_encoder is not None:
        audio_encoder = open_component(
            layout.audio_encoder, checkpoint_dims.infer_audio_encoder_dims, build_audio_encoder
        )
    vae = open_component(layout.vae, checkpoint_dims.infer_vae_dims, WanVae)
    found_tokenizer = open_tokenizer(layout.tokenizer_folder, text_encoder.files)
    if layout.tokenizer_folder is None:
        logger.info("tokenizer from %s", found_tokenizer.source)
    checkpoint = Checkpoint(
        folder=layout.transformers[0].folder if folder is None else folder,
        transformers=tuple(transformer for transformer, _ in transformer_pairs),
        context_projections=tuple(projection for _, projection in transformer_pairs),
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        vae=vae,
        face_encoder=open_face_encoder(transformer_pairs[0][0]),
        audio_encoder=audio_encoder,
        audio_projection=open_audio_projection(transformer_pairs[0][0], dtype),
        tokenizer=found_tokenizer.tokenizer,
        tokenizer_digests=found_tokenizer.digests,
    )
    _check_task(checkpoint, task)
    if loras:
        checkpoint = _add_loras(checkpoint, loras, allow_unmatched=allow_unmatched)
    num_words, num_embeddings = checkpoint.tokenizer.get_vocab_size(), text_encoder.dims.vocab_size
    if num_words > num_embeddings:
        raise InputError(
            f"{found_tokenizer.source} has {num_words} entries, "
            f"and {text_encoder.files} embeds {num_embeddings}: they come from different checkpoints"
        )
    return checkpoint


def open_transformer(
    component_files: ComponentFiles, dtype: torch.dtype, given_configs: Sequence[Path]
) -> tuple[
    Component[FusedTransformer, TransformerDims], Component[ContextProjection, TransformerDims]
]:
    """Open a transformer and its context projection, the two models that its files hold.

    With audio they hold a third one, see `open_audio_projection`.
    """
    config, files, key_map = component_files.open()
    if given_configs:
        configs = [read_checkpoint_json(path) for path in given_configs if path.exists()]
        config = checkpoint_dims.select_config_entries(configs, files, key_map)
    dims = checkpoint_dims.infer_transformer_dims(config, files, key_map)
    transformer = Component(
        dims, lambda **options: build_transformer(dims, dtype, **options), files, key_map
    )
    projection = Component(dims, lambda: ContextProjection(dims, dtype), files, key_map)
    with torch.device("meta"):
        models: list[nn.Module] = [transformer.build_model(), projection.build_model()]
        if (face_dims := checkpoint_dims.infer_face_encoder_dims(files, key_map)) is not None:
            models.append(FaceVideoEncoder(face_dims))
        if dims.audio_layers:
            models.append(AudioProjection(dims, dtype))
        check_keys(models, files, key_map)
    return transformer, projection


def open_audio_projection(
    transformer: Component[FusedTransformer, TransformerDims], dtype: torch.dtype
) -> Component[AudioProjection, TransformerDims] | None:
    """Return the audio projection in a transformer's files, None where there is none."""
    dims = transformer.dims
    if not dims.audio_layers:
        return None
    return Component(
        dims, lambda: AudioProjection(dims, dtype), transformer.files, transformer.key_map
    )


def open_face_encoder(
    transformer: Component[FusedTransformer, TransformerDims],
) -> Component[FaceVideoEncoder, FaceEncoderDims] | None:
    """Return the face encoder in a transformer's files, None where there is none.

    Raises InputError where files have another blur kernel than the published models.
    """
    files, key_map = transformer.files, transformer.key_map
    dims = checkpoint_dims.infer_face_encoder_dims(files, key_map)
    if dims is None:
        return None
    for key in files.shapes:
        if BLUR_KERNEL_PATTERN.search(key):
            kernel = files.read(key).float()
            if kernel.shape != (4, 4) or not torch.allclose(kernel, make_blur_kernel()):
                raise InputError(
                    f"{files} has another kernel than [1, 3, 3, 1] in {key}: it is not a model of Wan-Animate"
                )
    return Component(dims, lambda: FaceVideoEncoder(dims), files, key_map)


def _add_loras(
    checkpoint: Checkpoint, settings: Sequence[LoraSetting], *, allow_unmatched: bool
) -> Checkpoint:
    """Return the checkpoint with transformers and context projections to whose weights LoRAs are added."""
    pairs = list(zip(checkpoint.transformers, checkpoint.context_projections, strict=True))
    shapes = []
    for components in pairs:
        with torch.device("meta"):
            models: list[nn.Module] = [component.build_model() for component in components]
            if checkpoint.audio_projection is not None:
                models.append(checkpoint.audio_projection.build_model())
        shapes.append(
            list_original_shapes(
                (name, tuple(parameter.shape))
                for model in models
                for name, parameter in model.named_parameters()
            )
        )
    merged_loras, updates = merge_loras(settings, shapes, allow_unmatched=allow_unmatched)

    def merge(
        component: Component[Model, TransformerDims], index: int
    ) -> Component[Model, TransformerDims]:
        return replace(component, key_map=add_updates(component.key_map, updates[index]))

    return replace(
        checkpoint,
        transformers=tuple(
            merge(transformer, index) for index, (transformer, _) in enumerate(pairs)
        ),
        context_projections=tuple(
            merge(projection, index) for index, (_, projection) in enumerate(pairs)
        ),
        audio_projection=None
        if checkpoint.audio_projection is None
        else merge(checkpoint.audio_projection, 0),
        loras=tuple(merged_loras),
    )


def _check_task(checkpoint: Checkpoint, task: Task) -> None:
    """Raise InputError if the checkpoint is of another task."""
    for component in checkpoint.transformers:
        check_transformer_task(component.dims, component.files, task)
    if (audio_encoder := checkpoint.audio_encoder) is not None:
        dims, states = checkpoint.transformers[0].dims, audio_encoder.dims.num_layers + 1
        if (dims.audio_dim, dims.num_audio_states) != (audio_encoder.dims.dim, states):
            raise InputError(
                f"{audio_encoder.files} has {states} states of {audio_encoder.dims.dim}, and the transformer "
                f"takes {dims.num_audio_states} of {dims.audio_dim}; use the audio encoder of its repository"
            )
    if checkpoint.vae.dims.latent_dim != task.latent_channels:
        raise InputError(
            f"{checkpoint.vae.files} has {checkpoint.vae.dims.latent_dim} latent channels, "
            f"{task.name} needs {task.latent_channels}"
        )
