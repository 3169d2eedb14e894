"""How much arithmetic a run is, from sizes alone; no torch."""

from wan_dist.models.dims import TransformerDims

IMAGE_TOKENS = 257
"""Features of one image that cross-attention looks at, besides the text."""


def count_forward_flops(dims: TransformerDims, num_tokens: int) -> int:
    """Return the floating-point operations of one pass of the transformer over a video of ``num_tokens`` tokens.

    A multiplication with its addition is two. Counted: the linears of the blocks, 2 L (6 D² + 2 D F) each, self-attention, 4 L² D, and
    cross-attention, 4 L C D, for D channels, F of the feed-forward network and C tokens of context; keys and values of the context
    are computed once in a run.
    """
    num_context_tokens = dims.text_len + (IMAGE_TOKENS if dims.image_dim else 0)
    linear_flops = 2 * num_tokens * (6 * dims.dim**2 + 2 * dims.dim * dims.ffn_dim)
    attention_flops = 4 * num_tokens * (num_tokens + num_context_tokens) * dims.dim
    return dims.num_layers * (linear_flops + attention_flops)
