"""One model of a checkpoint alone: VAE, text encoder or transformer, from a file or a folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_dist.models.context import ContextProjection
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.text_encoder import TextEncoder, build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import get_task
from wan_dist.weights import checkpoint_dims
from wan_dist.weights.checkpoint import open_transformer
from wan_dist.weights.component import Component, open_component
from wan_dist.weights.layout import CheckpointLayout, ComponentFiles, find_layout, use_file
from wan_dist.weights.tokenizer_files import open_tokenizer

_TEXT_LEN = 512
"""Tokens of a prompt that the published models take."""


def load_vae(
    source: str | Path,
    *,
    task: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanVae:
    """Return a VAE, from a file of any known kind, or from the checkpoint folder of ``task``.

    `WanVae.encode` takes chunks (1, 3, n, H, W) in [-1, 1] (see `split_frames_into_chunks`) and returns
    latents (1, C, T, h, w); `WanVae.decode` takes latents and yields chunks. Raises InputError for a file of
    another kind, before weights are read.
    """
    files = _find_files(source, "vae_file", task)
    component: Component[WanVae, Any] = open_component(
        files, checkpoint_dims.infer_vae_dims, WanVae
    )
    return component.load(torch.device(device), dtype=dtype)


def load_text_encoder(
    source: str | Path,
    *,
    task: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> TextEncoder:
    """Return umT5 with its tokenizer; a call with a prompt returns its embedding (n, text_dim).

    ``source`` as for `load_vae`. The tokenizer is that of the folder, of the file, or of the Hugging Face
    cache. Raises InputError for a file of another kind, and without a tokenizer.
    """
    files = _find_files(source, "t5_file", task)
    component: Component[nn.Module, Any] = open_component(
        files, checkpoint_dims.infer_text_encoder_dims, lambda dims: build_text_encoder(dims, dtype)
    )
    folder = _find_layout(source, task).tokenizer_folder if Path(source).is_dir() else None
    tokenizer = open_tokenizer(folder, component.files).tokenizer
    device = torch.device(device)
    return TextEncoder(component.load(device), tokenizer, text_len=_TEXT_LEN, device=device)


def load_transformer(
    source: str | Path,
    *,
    task: str | None = None,
    expert: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[FusedTransformer, ContextProjection]:
    """Return a transformer, and the projection of text embeddings to its keys and values.

    ``projection([embedding])`` returns the contexts that the transformer takes, one for each prompt.
    ``source`` as for `load_vae`; ``expert`` is 0 for high and 1 for low noise in a folder with two. Raises
    InputError for a file of another kind or task, before weights are read.
    """
    files = _find_files(source, "dit_file", task, expert)
    transformer, projection = open_transformer(files, dtype, ())
    device = torch.device(device)
    return transformer.load(device), projection.load(device)


def _find_layout(source: str | Path, task: str | None) -> CheckpointLayout:
    if task is None:
        raise InputError(f"{source} is a folder; give the task of this checkpoint (task=NAME)")
    return find_layout(Path(source).expanduser(), get_task(task))


def _find_files(
    source: str | Path, setting: str, task: str | None, expert: int = 0
) -> ComponentFiles:
    """Return the files of the model that ``setting`` would name; raises InputError if there are none."""
    path = Path(source).expanduser()
    if path.is_file():
        return use_file(setting, path)
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder")
    layout = _find_layout(path, task)
    if setting == "vae_file":
        return layout.vae
    if setting == "t5_file":
        return layout.text_encoder
    if not 0 <= expert < len(layout.transformers):
        raise InputError(f"expert={expert}: {path} has {len(layout.transformers)} transformers")
    return layout.transformers[expert]
