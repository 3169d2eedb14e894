"""A checkpoint folder -> the models in it, checked at once and loaded when they are needed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn
from transformers import PreTrainedTokenizerBase

from wan_dist.catalog import ORIGINAL_LAYOUT, Task
from wan_dist.errors import InputError
from wan_dist.log import logger
from wan_dist.models.attention import InnerAttention
from wan_dist.models.text_encoder import TextEncoderDims, build_text_encoder, load_tokenizer
from wan_dist.models.transformer import TransformerDims, WanTransformer
from wan_dist.models.vae import VaeDims, WanVae
from wan_dist.weights.files import TensorFiles, first_line, open_sharded
from wan_dist.weights.load import check_keys, fill
from wan_dist.weights.names import (
    KeyMap,
    text_encoder_dims,
    text_encoder_keys,
    transformer_dims,
    transformer_keys,
    vae_dims,
    vae_keys,
)

Model = TypeVar("Model", bound=nn.Module)
Dims = TypeVar("Dims")


@dataclass(frozen=True)
class Component(Generic[Model, Dims]):
    """One model of a checkpoint: how to build it and where its weights are."""

    dims: Dims
    build: Callable[..., Model]
    files: TensorFiles
    keys: KeyMap

    def check(self) -> None:
        """Raise InputError if files and model do not match, without reading weights."""
        with torch.device("meta"):
            check_keys(self.build(), self.files, self.keys)

    def load(self, device: torch.device, **options: object) -> Model:
        """Return the model on ``device``; ``options`` go to its constructor."""
        with torch.device("meta"):
            model = self.build(**options)
        fill(model, self.files, self.keys, device)
        return model


@dataclass(frozen=True)
class Checkpoint:
    """The models of one folder."""

    folder: Path
    transformer: Component[WanTransformer, TransformerDims]
    text_encoder: Component[nn.Module, TextEncoderDims]
    vae: Component[WanVae, VaeDims]
    tokenizer: PreTrainedTokenizerBase


def open_checkpoint(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Open a folder in the original layout; every file is checked against its model, no weights are read.

    Raises InputError for what is missing, damaged or of another model.
    """
    _check_layout(folder)
    names = ORIGINAL_LAYOUT
    try:
        config = json.loads((folder / names.config).read_text())
    except ValueError as fault:
        raise InputError(f"{folder / names.config} is not valid JSON: {fault}") from None
    transformer_files = open_sharded(folder, names.transformer)
    text_files, vae_files = TensorFiles([folder / names.text_encoder]), TensorFiles([folder / names.vae])
    t_dims, e_dims, v_dims = (
        transformer_dims(config, transformer_files.shapes),
        text_encoder_dims(text_files.shapes),
        vae_dims(vae_files.shapes),
    )

    def build_transformer(inner_attention: InnerAttention | None = None) -> WanTransformer:
        return WanTransformer(t_dims, dtype, inner_attention)

    checkpoint = Checkpoint(
        folder,
        Component(t_dims, build_transformer, transformer_files, transformer_keys),
        Component(e_dims, lambda: build_text_encoder(e_dims, dtype), text_files, text_encoder_keys),
        Component(v_dims, lambda: WanVae(v_dims), vae_files, vae_keys),
        _tokenizer(folder / names.tokenizer),
    )
    for component in (checkpoint.transformer, checkpoint.text_encoder, checkpoint.vae):
        component.check()
    return checkpoint


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(folder)
    except Exception as fault:  # transformers and tokenizers raise many types, tokenizers even the bare one
        raise InputError(f"{folder} holds no tokenizer that can be read; download it again ({first_line(fault)})") from None


def _check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"ckpt_dir={folder} is not a folder")
    if (folder / "model_index.json").exists():
        raise InputError(f"{folder} is in the Diffusers layout, which is not supported yet; use the repository without -Diffusers")
    needed = (ORIGINAL_LAYOUT.config, ORIGINAL_LAYOUT.text_encoder, ORIGINAL_LAYOUT.vae, ORIGINAL_LAYOUT.tokenizer)
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder} is not a complete Wan checkpoint: it has no {', '.join(missing)}")


def find_checkpoint(task: Task) -> Path:
    """Return the folder of the task's published checkpoint: from the Hugging Face cache if it is whole there, else downloaded.

    Raises InputError, with the folder that is wanted, when it is neither there nor can be fetched.
    """
    patterns = ORIGINAL_LAYOUT.patterns
    try:
        folder = Path(snapshot_download(task.repository, allow_patterns=patterns, local_files_only=True))
        _check_layout(folder)
        open_sharded(folder, ORIGINAL_LAYOUT.transformer)
        return folder
    except (LocalEntryNotFoundError, InputError):
        logger.info("download  %s to the Hugging Face cache", task.repository)
    try:
        return Path(snapshot_download(task.repository, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as fault:
        raise InputError(
            f"the checkpoint of {task.name} is not on this machine and could not be downloaded ({type(fault).__name__}); where there is "
            f"internet run `hf download {task.repository} --local-dir FOLDER`, then pass ckpt_dir=FOLDER; it must hold "
            + ", ".join(patterns)
        ) from None
