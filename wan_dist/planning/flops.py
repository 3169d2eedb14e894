"""FLOP count of the transformer, from sizes alone; no torch."""

from wan_dist.models.dims import TransformerDims

IMAGE_TOKENS = 257
"""Context tokens of one image in cross-attention, besides those of the text."""


def count_forward_flops(dims: TransformerDims, num_tokens: int) -> int:
    """Return the FLOPs of one forward pass of the transformer over a video of ``num_tokens`` tokens.

    A multiply-add counts as two. Counted are, for each block, the linear layers, 2 L (6 D² + 2 D F),
    self-attention, 4 L² D, and cross-attention, 4 L C D, for L tokens, D channels, F feed-forward channels
    and C context tokens. Keys and values of the context are left out, as they are computed once in a run.
    Blocks of VACE's side branch have another linear of D², and the first of them two; those of Animate's
    face adapter and injections of audio have two linears of D² for each token, and an attention to five
    keys that is left out.
    """
    num_context_tokens = dims.text_len + (IMAGE_TOKENS if dims.image_dim else 0)
    linear_flops = 2 * num_tokens * (6 * dims.dim**2 + 2 * dims.dim * dims.ffn_dim)
    attention_flops = 4 * num_tokens * (num_tokens + num_context_tokens) * dims.dim
    vace_flops = 2 * num_tokens * (len(dims.vace_layers) + 1) * dims.dim**2
    num_blocks = len(dims.context_block_names)
    num_additions = len(dims.face_layers) + len(dims.audio_layers)
    addition_flops = num_additions * 2 * num_tokens * 2 * dims.dim**2
    return (
        num_blocks * (linear_flops + attention_flops)
        + (vace_flops if dims.vace_layers else 0)
        + addition_flops
    )
