"""A checkpoint folder -> the models in it, checked at once and loaded when they are needed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import ImageEncoderDims, ModelDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder, load_tokenizer
from wan_dist.models.transformer import WanTransformer
from wan_dist.models.vae.model import WanVae
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.text_files import UnreadableError, check_file
from wan_dist.tasks.registry import Task
from wan_dist.weights import checkpoint_dims as read_dims
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.identity import digest_of_weights
from wan_dist.weights.key_maps import KeyMap
from wan_dist.weights.layout import Part, find_layout
from wan_dist.weights.load import check_keys, fill, read_parameters
from wan_dist.weights.streaming import Streaming, stream_blocks

Model = TypeVar("Model", bound=nn.Module)
Dims = TypeVar("Dims")


@dataclass(frozen=True)
class Component(Generic[Model, Dims]):
    """One model of a checkpoint: how to build it and where its weights are."""

    dims: Dims
    build: Callable[..., Model]
    files: TensorFiles
    keys: KeyMap

    def load(
        self,
        device: torch.device,
        *,
        spread: Callable[[Model], None] | None = None,
        streaming: Streaming | None = None,
        **options: object,
    ) -> Model:
        """Return the model on ``device``; ``options`` go to its constructor.

        ``spread`` may shard it before it is filled. With ``streaming`` the weights of its blocks visit the device in turn.
        """
        with torch.device("meta"):
            model = self.build(**options)
        if spread is not None:
            spread(model)
        if streaming is None:
            fill(model, self.files, self.keys, device)
            return model
        fill(model, self.files, self.keys, device, leave=(streaming.blocks + ".", *streaming.leave))

        def read(index: int, parameters: dict[str, Tensor]) -> None:
            named = {f"{streaming.blocks}.{names[index]}.{name}": value for name, value in parameters.items()}
            read_parameters(named, self.files, self.keys, device)

        names, blocks = zip(*model.get_submodule(streaming.blocks).named_children(), strict=True)
        stream_blocks(blocks, read, device, from_disk=streaming.from_disk, num_rounds=streaming.num_rounds)
        return model

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return these rows of one parameter, on the CPU; nothing else of it is read."""
        (source,) = self.keys.sources(name)
        return torch.cat([self.files.read_rows(source.key, index, index + 1) for index in indices])


@dataclass(frozen=True)
class Checkpoint:
    """The models of one folder. ``transformers``: one, or those for high and for low noise, in this order."""

    folder: Path
    transformers: tuple[Component[WanTransformer, TransformerDims], ...]
    projections: tuple[Component[ContextProjection, TransformerDims], ...]
    """For each transformer, from the same files: what makes its cross-attention's keys and values."""
    text_encoder: Component[nn.Module, TextEncoderDims]
    image_encoder: Component[nn.Module, ImageEncoderDims] | None
    vae: Component[WanVae, VaeDims]
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def digest(self) -> str:
        """What tells these models from others: weights, sizes that no weight shows, the tokenizer's files."""
        components = (*self.transformers, self.text_encoder, self.vae, self.image_encoder)
        weights = digest_of_weights(component.files for component in components if component is not None)
        sizes = [component.dims for component in components if component is not None]
        files = sorted(file for file in Path(self.tokenizer.name_or_path).iterdir() if file.is_file())
        return hashlib.sha256(repr((weights, sizes, [hash_file(file) for file in files])).encode()).hexdigest()

    @cached_property
    def vae_digest(self) -> str:
        """The same of the VAE alone."""
        return digest_of_weights([self.vae.files])

    @property
    def models(self) -> ModelDims:
        """Sizes of its models."""
        return ModelDims(
            transformer=self.transformers[0].dims,
            text_encoder=self.text_encoder.dims,
            image_encoder=None if self.image_encoder is None else self.image_encoder.dims,
            vae=self.vae.dims,
        )


def open_checkpoint(folder: Path, task: Task, dtype: torch.dtype, *, transformer_files: Sequence[Path] = ()) -> Checkpoint:
    """Open a folder in either layout; every file is checked against its model, no weights are read.

    ``transformer_files`` hold the transformers' weights instead of the folder's. Raises InputError for what is missing, damaged, or of
    another model or task.
    """
    layout = find_layout(folder, task, transformer_files)
    pairs = [_transformer(part, dtype) for part in layout.transformers]
    checkpoint = Checkpoint(
        folder=folder,
        transformers=tuple(transformer for transformer, _ in pairs),
        projections=tuple(projection for _, projection in pairs),
        text_encoder=_component(layout.text_encoder, read_dims.text_encoder_dims, lambda dims: build_text_encoder(dims, dtype)),
        image_encoder=None
        if layout.image_encoder is None
        else _component(layout.image_encoder, read_dims.image_encoder_dims, build_image_encoder),
        vae=_component(layout.vae, read_dims.vae_dims, WanVae),
        tokenizer=_tokenizer(layout.tokenizer),
    )
    _check_task(checkpoint, task)
    if (words := len(checkpoint.tokenizer)) > (rows := checkpoint.text_encoder.dims.vocab_size):
        raise InputError(f"{layout.tokenizer} has {words} words, and {checkpoint.text_encoder.files} {rows}: they do not belong together")
    return checkpoint


def _component(part: Part, read: Callable[..., Dims], build: Callable[..., Model]) -> Component[Model, Dims]:
    """Open one part of a checkpoint and check its files' tensors against the model they are for."""
    config, files, keys = part.open()
    dims = read(config, files, keys)
    component = Component(dims, lambda **options: build(dims, **options), files, keys)
    with torch.device("meta"):
        check_keys([component.build()], files, keys)
    return component


def _transformer(
    part: Part, dtype: torch.dtype
) -> tuple[Component[WanTransformer, TransformerDims], Component[ContextProjection, TransformerDims]]:
    """Open a transformer as the two models that its files hold."""
    config, files, keys = part.open()
    dims = read_dims.transformer_dims(config, files, keys)
    transformer = Component(dims, lambda **options: WanTransformer(dims, dtype, **options), files, keys)
    projection = Component(dims, lambda: ContextProjection(dims, dtype), files, keys)
    with torch.device("meta"):
        check_keys([transformer.build(), projection.build()], files, keys)
    return transformer, projection


def _check_task(checkpoint: Checkpoint, task: Task) -> None:
    """Raise InputError if the checkpoint is of another task; its size is its own affair."""
    wanted = task.transformer
    for component in checkpoint.transformers:
        found = component.dims
        traits = {
            "input channels": (found.in_dim, wanted.in_dim),
            "output channels": (found.out_dim, wanted.out_dim),
            "image branches": (int(found.image_dim > 0), int(wanted.image_dim > 0)),
            "position embeddings for two images": (int(found.image_positions > 0), int(wanted.image_positions > 0)),
        }
        wrong = [f"{is_} {trait}, not {should}" for trait, (is_, should) in traits.items() if is_ != should]
        if wrong:
            raise InputError(f"{checkpoint.folder} is not a {task.name} checkpoint: its transformer has {', '.join(wrong)}")
    if checkpoint.vae.dims.latent_dim != task.latent_channels:
        raise InputError(
            f"{checkpoint.vae.files} has {checkpoint.vae.dims.latent_dim} latent channels, {task.name} needs {task.latent_channels}"
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        for file in folder.iterdir():
            if not file.is_dir():
                check_file(file)
        return load_tokenizer(folder)
    except UnreadableError as fault:
        raise InputError(f"{file} cannot be read: {fault}; download it again") from None
    except Exception as fault:  # transformers and tokenizers raise many types, tokenizers even the bare one
        raise InputError(f"{folder} holds no tokenizer that can be read; download it again ({first_line(fault)})") from None
