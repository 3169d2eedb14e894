"""Context projection: what the transformer takes beside the latents, computed once a video.

Text and image features become every block's cross-attention keys and values, control inputs become tokens.

These layers are a quarter of an image-to-video transformer's weights and are not needed in the denoising
steps, so they are a model of their own, which is freed before the transformer is loaded. Layer names are
those of the published checkpoints, except that k and v are one linear.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.control import CameraAdapter, ControlTokens, ReferenceEmbedding
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.kernels.transformer_ops import rms_norm
from wan_dist.models.transformer import RMSNorm


class ImageEmbedding(nn.Module):
    """Projection of image features to the transformer's width, in float32.

    The features of several images get a position embedding where the model has one.
    """

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__()
        width = dims.image_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, dims.dim),
            nn.LayerNorm(dims.dim),
        )
        self.emb_pos = (
            nn.Parameter(torch.zeros(1, dims.image_positions, width))
            if dims.image_positions
            else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (n, 257, image_dim) of n images -> (1, 257 n, D)."""
        features = features.float().flatten(0, 1).unsqueeze(0)
        return self.proj(features if self.emb_pos is None else features + self.emb_pos)


class KeyValueProjection(nn.Module):
    """Key and value projections of one block, with RMSNorm over the whole width of k."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.eps = dims.eps
        self.kv = nn.Linear(dims.dim, 2 * dims.dim, dtype=dtype)
        self.norm_k = RMSNorm(dims.dim, dims.eps)
        if dims.image_dim:
            self.kv_img = nn.Linear(dims.dim, 2 * dims.dim, dtype=dtype)
            self.norm_k_img = RMSNorm(dims.dim, dims.eps)

    def forward(
        self, texts: Sequence[Tensor], image: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return k and v (2, B, n, H, D / H) of each embedded text (B, n, D), and of the embedded images."""
        keys_values = [self._normalize_keys_values(self.kv(text), self.norm_k) for text in texts]
        if image is None:
            return keys_values, None
        return keys_values, self._normalize_keys_values(self.kv_img(image), self.norm_k_img)

    def _normalize_keys_values(self, kv: Tensor, norm: RMSNorm) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        k = rms_norm(k, norm.weight, self.eps).to(kv.dtype)
        return torch.stack([k, v]).unflatten(-1, (self.num_heads, -1))


class ContextBlock(nn.Module):
    """The key and value projections of one block, nested as their names in the checkpoint need it."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.cross_attn = KeyValueProjection(dims, dtype)

    def forward(
        self, texts: Sequence[Tensor], image: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `KeyValueProjection.forward`."""
        keys_values: tuple[list[Tensor], Tensor | None] = self.cross_attn(texts, image)
        return keys_values


class ContextProjection(nn.Module):
    """Projection of embedded prompts and image features to `ContextKV`, of control inputs to tokens."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.text_len = dims.text_len
        self.dtype = dtype
        self.text_embedding = nn.Sequential(
            nn.Linear(dims.text_dim, dims.dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dims.dim, dims.dim, dtype=dtype),
        )
        if dims.image_dim:
            self.img_emb = ImageEmbedding(dims)
        if dims.ref_conv_in_dim:
            self.ref_conv = ReferenceEmbedding(dims, dtype)
        if dims.camera_in_dim:
            self.control_adapter = CameraAdapter(dims, dtype)
        self.block_names = list(dims.context_block_names)
        for name in self.block_names:
            list_name, _, index = name.partition(".")
            if list_name not in self._modules:
                self.add_module(list_name, nn.ModuleDict())
            cast(nn.ModuleDict, self.get_submodule(list_name))[index] = ContextBlock(dims, dtype)

    def layers(self) -> dict[str, nn.Module]:
        """Return all blocks by name, in the order in which they are called."""
        return {name: self.get_submodule(name) for name in self.block_names}

    def select_blocks(self, indices: Iterable[int]) -> None:
        """Drop all blocks but these, which may repeat; `forward` then returns these, in this order.

        ``indices`` are those in `TransformerDims.context_block_names`.
        """
        selected_names = [self.block_names[index] for index in indices]
        for name in set(self.block_names).difference(selected_names):
            list_name, _, index = name.partition(".")
            del cast(nn.ModuleDict, self.get_submodule(list_name))[index]
        self.block_names = selected_names

    def embed_control(
        self, reference_latents: Tensor | None, cameras: Tensor | None, size: Sequence[int]
    ) -> ControlTokens:
        """Return the tokens of a reference image (1, C, 1, h, w) and of cameras (F, 16), if they are given.

        ``size``: (T, h, w) of the video's latents; see `CameraAdapter.embed`.
        """
        return ControlTokens(
            None if reference_latents is None else self.ref_conv.embed(reference_latents),
            None if cameras is None else self.control_adapter.embed(cameras, size),
        )

    def forward(
        self, prompts: Sequence[Tensor], image_features: Tensor | None = None
    ) -> list[ContextKV]:
        """Return every block's k and v of each prompt, and those of the images, which all prompts share.

        prompts (tokens, text_dim) or (B, tokens, text_dim), at most 512 tokens each; image_features
        (n, 257, image_dim) of n images for a model with an image branch. Rows of zeros pad a text to 512
        tokens and ARE attended to: the published weights were trained so. One such row is computed and
        stands for all of them.
        """
        image = None if image_features is None else self.img_emb(image_features).to(self.dtype)
        embedded_texts = []
        for prompt in prompts:
            batch = prompt.to(self.dtype) if prompt.dim() == 3 else prompt.to(self.dtype)[None]
            is_padded = batch.shape[1] < self.text_len
            embedded_texts.append(
                self.text_embedding(F.pad(batch, (0, 0, 0, int(is_padded))))
            )  # (B, n + 1, D)
        kv_by_block = {name: block(embedded_texts, image) for name, block in self.layers().items()}
        block_kvs = [kv_by_block[name] for name in self.block_names]
        image_kv = (
            None if image is None else torch.stack([cast(Tensor, block[1]) for block in block_kvs])
        )
        return [
            ContextKV(torch.stack([block[0][prompt_index] for block in block_kvs]), image_kv)
            for prompt_index in range(len(embedded_texts))
        ]
