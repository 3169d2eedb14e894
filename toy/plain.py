"""Differentiable forward pass of `WanTransformer`, without in-place operations, for training."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.attention.rotary import apply_rotary
from wan_dist.models.context import ContextBlock, ContextProjection
from wan_dist.models.kernels.transformer_ops import rms_norm
from wan_dist.models.transformer import WanTransformer
from wan_dist.models.transformer_block import TransformerBlock


def project(projection: ContextProjection, texts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return every block's k and v (B, H, n, D) of text embeddings (B, n, text_dim), n with padding."""
    embedded = projection.text_embedding(texts)
    found = []
    for index in projection.block_indices:
        block = cast(ContextBlock, projection.blocks[str(index)]).cross_attn
        k, v = block.kv(embedded).chunk(2, dim=-1)
        k = rms_norm(k, block.norm_k.weight, block.eps).to(v.dtype)
        found.append((_heads(k, block.num_heads), _heads(v, block.num_heads)))
    return found


def velocity(
    model: WanTransformer,
    latents: Tensor,
    timesteps: Tensor,
    contexts: Sequence[tuple[Tensor, Tensor]],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the velocity (B, C, T, h, w) of latents (B, C, T, h, w).

    ``timesteps`` (B, 2): that of the first latent frame, and that of the others.
    """
    time, block_time = model.embed_timesteps(timesteps)
    num_first = latents.shape[3] * latents.shape[4] // 4
    x = model.patch_embedding(latents)
    is_first = (torch.arange(x.shape[1], device=x.device) < num_first).view(1, -1, 1, 1)
    block_time = torch.where(is_first, block_time[:, :1], block_time[:, 1:])  # (B, L, 6, D)
    for block, context in zip(model.blocks, contexts, strict=True):
        x = _block(cast(TransformerBlock, block), x, block_time, context, rotary)
    time = torch.where(is_first, time[:, :1, None], time[:, 1:, None])  # (B, L, 1, D)
    shift, scale = (model.head.modulation + time).unbind(2)
    out = model.head.head(_norm(x, model.head.eps) * (1 + scale) + shift)
    return model.unpatchify_tokens(out, latents.shape[2:])


def _block(
    block: TransformerBlock,
    x: Tensor,
    time: Tensor,
    context: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    shift, scale, gate, shift2, scale2, gate2 = (block.modulation + time).unbind(2)
    attention, cross = block.self_attn, block.cross_attn
    q, k, v = attention.qkv(_norm(x, block.eps) * (1 + scale) + shift).chunk(3, dim=-1)
    q, k = (
        apply_rotary(
            rms_norm(each, norm.weight, block.eps).unflatten(-1, (attention.num_heads, -1)), rotary
        )
        for each, norm in ((q, attention.norm_q), (k, attention.norm_k))
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2).to(v.dtype), k.transpose(1, 2).to(v.dtype), _heads(v, attention.num_heads)
    )
    x = x + gate * attention.o(out.transpose(1, 2).flatten(2))
    q = cross.q(F.layer_norm(x, (x.shape[-1],), block.norm3.weight, block.norm3.bias, block.eps))
    q = rms_norm(q, cross.norm_q.weight, cross.eps).to(v.dtype)
    out = F.scaled_dot_product_attention(_heads(q, cross.num_heads), *context)
    x = x + cross.o(out.transpose(1, 2).flatten(2))
    up, _, down = block.ffn
    return x + gate2 * down(
        F.gelu(up(_norm(x, block.eps) * (1 + scale2) + shift2), approximate="tanh")
    )


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=eps)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, n, D)
