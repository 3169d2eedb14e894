"""The transformer class that a checkpoint's dims ask for."""

import torch

from wan_dist.models.animate import AnimateTransformer
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.speech import SpeechTransformer
from wan_dist.models.vace import VaceTransformer


def build_transformer(
    dims: TransformerDims, dtype: torch.dtype, inner_attention: InnerAttention | None = None
) -> FusedTransformer:
    """Return a transformer of these dims, with a side branch, a face adapter or audio if they have one."""
    if dims.face_layers:
        return AnimateTransformer(dims, dtype, inner_attention)
    if dims.audio_layers:
        return SpeechTransformer(dims, dtype, inner_attention)
    transformer_class = VaceTransformer if dims.vace_layers else FusedTransformer
    return transformer_class(dims, dtype, inner_attention)
