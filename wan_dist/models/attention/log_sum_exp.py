"""Attention with the log-sum-exp of its scores, by which partial results are merged."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from wan_dist.models.attention.backends import load_flash_attention_4
from wan_dist.models.kernels.transformer_ops import FLOAT32_CHUNK_TOKENS

RING_SCORE_BYTES = 2**26
"""Size of the scores in memory at once where ring attention uses plain arithmetic.

As in planning/memory_estimate.py.
"""


class KeyBias(NamedTuple):
    """A number that is added to the scores of some keys."""

    start: int
    """Row of the first of them in the whole sequence."""
    stop: int
    value: float


def split_keys(
    num_keys: int, bias: KeyBias | None, first_row: int = 0
) -> Iterator[tuple[slice, float]]:
    """Yield runs of keys, none empty, with what is added to their scores.

    ``first_row``: that of the first key in the whole sequence.
    """
    if bias is None:
        bounds, values = [0, num_keys], [0.0]
    else:
        start, stop = (min(max(row - first_row, 0), num_keys) for row in bias[:2])
        bounds, values = [0, start, stop, num_keys], [0.0, bias.value, 0.0]
    for index, value in enumerate(values):
        if bounds[index] < bounds[index + 1]:
            yield slice(bounds[index], bounds[index + 1]), value


def merge_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return attention to all keys, both float32, of that to parts of them, None without any.

    Each part, and the result, is (B, L, H, D) with the log-sum-exp (B, L, H).
    """
    merged: tuple[Tensor, Tensor] | None = None
    for part in parts:
        if merged is None:
            merged = part[0].float(), part[1].contiguous()
        else:
            merge_attention_(*merged, *part)
        del part  # else it is in memory beside the next one
    return merged


def merge_attention_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge attention to other keys into ``out`` (B, L, H, D) and ``lse`` (B, L, H), in place.

    Both are float32; ``lse`` is the log-sum-exp. The outputs are merged in chunks of tokens, which bounds the
    memory of float32 intermediates.
    """
    for start in range(0, out.shape[1], FLOAT32_CHUNK_TOKENS):
        rows = slice(start, start + FLOAT32_CHUNK_TOKENS)
        other_weight = torch.sigmoid(other_lse[:, rows] - lse[:, rows]).unsqueeze(-1)
        out[:, rows].lerp_(other_out[:, rows].float(), other_weight)
    torch.logaddexp(lse, other_lse, out=lse)


def attend_with_lse(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention's result (B, Lq, H, D) and its log-sum-exp (B, Lq, H), float32.

    Shapes as in `InnerAttention.forward`. FlashAttention-4 where ``name`` is fa4, cuDNN where it is cudnn,
    else FlashAttention-2 where the GPU and the dtype support it, else plain arithmetic in float32, a part
    of the scores at a time.
    """
    if name == "fa4":
        out, lse_by_head = load_flash_attention_4()(q, k, v, return_lse=True)
        return out, cast(Tensor, lse_by_head).float().transpose(1, 2)
    has_flash = (
        q.is_cuda
        and q.dtype != torch.float32
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    if name != "cudnn" and not has_flash:
        return _attend_in_parts(q, k, v)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, L, D)
    if name == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        lse = lse.squeeze(-1)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2).to(v.dtype), lse.float().transpose(1, 2)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by plain arithmetic in float32, in parts whose scores fit in `RING_SCORE_BYTES`.

    A part has as many heads as fit, and of those as many queries as fit.
    """
    (batch, num_queries, num_heads, width), num_keys = q.shape, k.shape[1]
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )
    max_score_rows = RING_SCORE_BYTES // (4 * batch * num_keys)  # rows of scores
    heads_per_part = min(max(max_score_rows // max(num_queries, 2 * width), 1), num_heads)
    queries_per_part = max(max_score_rows // heads_per_part, 1)
    for first_head in range(0, num_heads, heads_per_part):
        head_slice = slice(first_head, first_head + heads_per_part)
        keys, values = (
            tensor[:, :, head_slice].transpose(1, 2).float() for tensor in (k, v)
        )  # (B, h, Lk, D)
        for first_query in range(0, num_queries, queries_per_part):
            query_slice = slice(first_query, first_query + queries_per_part)
            queries = (
                q[:, query_slice, head_slice].transpose(1, 2).float() * width**-0.5
            )  # (B, h, l, D)
            scores = queries @ keys.transpose(-1, -2)  # (B, h, l, Lk)
            max_scores = scores.amax(dim=-1, keepdim=True)
            weight_sum = scores.sub_(max_scores).exp_().sum(dim=-1, keepdim=True)
            out[:, query_slice, head_slice] = (
                (scores @ values / weight_sum).transpose(1, 2).to(out.dtype)
            )
            lse[:, query_slice, head_slice] = (
                (max_scores + weight_sum.log()).squeeze(-1).transpose(1, 2)
            )
            del scores  # else it stays in memory beside the next part's
    return out, lse
