"""Random checkpoints in the published layout.

Small ones for tests, and full-size ones for whole runs without a download.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from toy.tokenizer import SPECIAL_TOKENS, add_end_mark, save_tokenizer
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import ModelDims
from wan_dist.models.face_encoder import FaceVideoEncoder
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.weights.key_maps import (
    KeyMap,
    map_original_image_encoder,
    map_original_text_encoder,
    map_original_transformer,
    map_original_vae,
)
from wan_dist.weights.layout import (
    IMAGE_ENCODER_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_STEM,
)
from wan_dist.weights.write import export_tensors, write_transformer_config


def make_checkpoint(
    folder: Path,
    dims: ModelDims,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    transformer_folder: str = ".",
    text_encoder_of: Path | None = None,
    save: Callable[[Iterable[tuple[str, Tensor]], Path], None] = lambda tensors, file: save_file(
        dict(tensors), file
    ),
) -> None:
    """Write a checkpoint with random weights into ``folder``.

    Weights that are drawn on the CPU are the same on every machine. ``dtype`` is that of the transformer's
    linears and of the text encoder, which may be a link to that of the folder ``text_encoder_of``. ``save``
    writes the transformer's tensors into a safetensors file.
    """
    place = folder / transformer_folder
    place.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        transformer = build_transformer(dims.transformer, dtype)
        projection = ContextProjection(dims.transformer, dtype)
        text_encoder = build_text_encoder(dims.text_encoder, dtype)
        image_encoder = (
            None if dims.image_encoder is None else build_image_encoder(dims.image_encoder)
        )
        face_encoder = None if dims.face_encoder is None else FaceVideoEncoder(dims.face_encoder)
        vae = WanVae(dims.vae)
    keys = map_original_transformer([])
    parts = (transformer, projection, *([] if face_encoder is None else [face_encoder]))
    tensors = chain.from_iterable(_stored_tensors(part, keys, generator) for part in parts)
    save(tensors, place / f"{WEIGHTS_STEM}.safetensors")
    if text_encoder_of is None:
        torch.save(
            dict(_stored_tensors(text_encoder, map_original_text_encoder([]), generator)),
            folder / TEXT_ENCODER_FILE,
        )
    else:
        (folder / TEXT_ENCODER_FILE).symlink_to((text_encoder_of / TEXT_ENCODER_FILE).resolve())
    if image_encoder is not None and dims.image_encoder is not None:
        # The last layer of the published image encoder is not read; one tensor stands for it.
        last = f"visual.transformer.{dims.image_encoder.num_layers - 1}.norm1.weight"
        stored = dict(
            _stored_tensors(image_encoder, map_original_image_encoder([last]), generator)
        ) | {last: torch.ones(1)}
        torch.save(stored, folder / IMAGE_ENCODER_FILE)
    torch.save(
        dict(_stored_tensors(vae, map_original_vae([]), generator)),
        folder / f"Wan2.{2 if dims.vae.residual else 1}_VAE.pth",
    )
    write_transformer_config(dims.transformer, place)
    save_tokenizer(_make_byte_tokenizer(), folder / TOKENIZER_FOLDER)


def _stored_tensors(
    model: nn.Module, keys: KeyMap, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield random parameters under the checkpoint's keys, scaled to keep activations near 1."""

    def drawn() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "gamma" not in name:
                value = (
                    torch.randn(parameter.shape, generator=generator, device=generator.device)
                    / parameter[0].numel() ** 0.5
                )
            else:
                value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
            yield name, value.to(parameter.dtype)

    return export_tensors(drawn(), keys)


def _make_byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes, so that it takes any text, with an end mark."""
    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(alphabet)}, merges=[], unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return add_end_mark(tokenizer)
