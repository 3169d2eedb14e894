"""The toy's models in plain PyTorch: from a caption's tokens to the velocity of noisy latents."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from wan_dist.config.loras import LoraSetting
from wan_dist.models.context import ContextProjection
from wan_dist.models.text_encoder import build_text_encoder, tokenize_prompt
from wan_dist.models.transformer import WanTransformer
from wan_dist.models.vae.model import WanVae
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.key_maps import (
    add_updates,
    map_original_text_encoder,
    map_original_transformer,
    map_original_vae,
)
from wan_dist.weights.layout import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, WEIGHTS_STEM
from wan_dist.weights.load import fill_model
from wan_dist.weights.lora import merge_loras
from wan_dist.weights.tokenizer_files import load_tokenizer
from wan_dist.weights.write import export_tensors

DIMS = TASKS["toy"].model_dims
CHECKPOINT = Path(__file__).parent / "checkpoint"
TRANSFORMER_FILE = f"{WEIGHTS_STEM}.safetensors"
TEXT_ENCODER_NAME = Path(TEXT_ENCODER_FILE).with_suffix(".safetensors").name
VAE_FILE = "Wan2.1_VAE.safetensors"

Contexts = Sequence[tuple[Tensor, ...]]
"""Each block's keys and values of a batch of captions."""


class Denoiser(nn.Module):
    """Transformer and context projection, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = ContextProjection(DIMS.transformer, torch.float32)
        self.transformer = WanTransformer(DIMS.transformer, torch.float32)

    def project(self, texts: Tensor) -> Contexts:
        """Return what the blocks attend to, of embedded captions (B, n, text_dim)."""
        (context,) = self.projection([texts])
        return [context.select_block(index) for index in range(len(self.transformer.blocks))]

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        given: Tensor,
        contexts: Contexts,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the velocity of latents (B, C, T, h, w), float32, at noise levels (B).

        Where ``given`` (B), the first latent frame is not noisy and has a timestep of 0.
        """
        timesteps = 1000 * torch.stack([torch.where(given, 0, level), level], dim=1)
        return cast(Tensor, self.transformer(latents, timesteps, contexts, rotary))


def embed_captions(text_encoder: nn.Module, ids: Tensor) -> Tensor:
    """Return embedded captions (B, n, text_dim) of tokens (B, n); the rows of padding are zeros."""
    mask = ids != 0
    states = text_encoder(ids, mask)
    return cast(Tensor, states * mask.unsqueeze(-1))


def list_token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a caption's tokens, padded with 0 to the models' length."""
    text_len = DIMS.transformer.text_len
    ids = tokenize_prompt(tokenizer, text, text_len)
    return ids + [0] * (text_len - len(ids))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a GPU computes in bfloat16; its steps can be recorded."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


@dataclass(frozen=True)
class CaptionEncoder:
    """A text encoder with its tokenizer."""

    encoder: nn.Module
    tokenizer: Tokenizer
    device: torch.device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return embedded captions (B, n, text_dim), float32."""
        ids = torch.tensor([list_token_ids(self.tokenizer, text) for text in texts])
        return torch.cat(
            [embed_captions(self.encoder, some.to(self.device)) for some in ids.split(512)]
        )


def list_denoiser_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a denoiser's parameters in bfloat16, named as in the checkpoint."""
    halved = ((name.partition(".")[2], value.detach().bfloat16()) for name, value in named)
    return export_tensors(halved, map_original_transformer([]))


def load_denoiser(
    device: torch.device, *, file: Path | None = None, lora: Path | None = None
) -> Denoiser:
    """Return the base toy's denoiser or that of another file, float32, with a LoRA merged as runs do it."""
    files = TensorFiles([file or CHECKPOINT / TRANSFORMER_FILE])
    key_map = map_original_transformer([])
    if lora is not None:
        _, (updates,) = merge_loras(
            [LoraSetting("lora", lora, 1.0, None)], [files.shapes], allow_unmatched=False
        )
        key_map = add_updates(key_map, updates)
    with torch.device("meta"):
        denoiser = Denoiser()
    for model in (denoiser.projection, denoiser.transformer):
        fill_model(model, files, key_map, device)
    return denoiser


def load_caption_encoder(device: torch.device) -> CaptionEncoder:
    """Return the toy's text encoder."""
    with torch.device("meta"):
        encoder = build_text_encoder(DIMS.text_encoder, torch.float32)
    files = TensorFiles([CHECKPOINT / TEXT_ENCODER_NAME])
    fill_model(encoder, files, map_original_text_encoder([]), device)
    return CaptionEncoder(encoder, load_tokenizer(CHECKPOINT / TOKENIZER_FOLDER), device)


def load_vae(device: torch.device, file: Path = CHECKPOINT / VAE_FILE) -> WanVae:
    """Return the VAE of a file, float32."""
    with torch.device("meta"):
        vae = WanVae(DIMS.vae)
    fill_model(vae, TensorFiles([file]), map_original_vae([]), device)
    return vae
