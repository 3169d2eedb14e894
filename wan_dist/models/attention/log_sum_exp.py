"""Attention with the log-sum-exp of its scores, by which ring attention merges partial results."""

from typing import cast

import torch
from torch import Tensor

from wan_dist.models.attention.backends import load_flash_attention_4

RING_SCORE_BYTES = 2**26
"""Size of the scores in memory at once where ring attention uses plain arithmetic.

As in planning/memory_estimate.py.
"""


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
