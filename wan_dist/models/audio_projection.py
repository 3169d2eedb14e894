"""Audio projection of speech to video: features of a clip to keys, values and modulation, once a clip.

The transformer takes audio in by cross-attention after some of its blocks. What does not depend on the video
is computed here, before the first step, by a model of its own that is freed before the transformer is
loaded. The audio encoder is in float32. Shapes: B batch, D width, H heads, T latent frames, N tokens of a
latent frame. Layer names are those of the published checkpoints, but for ``injectors``, which holds all
layers of an injection.

Source: Wan-S2V (arXiv:2508.18621).
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels.transformer_ops import rms_norm
from wan_dist.models.transformer import RMSNorm

NUM_HISTORY_FRAMES = 73
"""Frames before a clip that the transformer is shown."""
NUM_HISTORY_LATENTS = (NUM_HISTORY_FRAMES - 1) // 4 + 1
_STREAM_STRIDES = (2, 2)
"""Strides in time of the second and third convolution; together the VAE's."""


class AudioContext(NamedTuple):
    """What one injection of audio takes, the same in all steps of a clip."""

    keys_values: Tensor
    """(2, B, T, N, H, D / H): k and v of each latent frame's audio."""
    modulation: Tensor
    """(2, B, T, D) float32: scale, to which 1 is added, and shift of the norm before attention."""


class CausalConv(nn.Module):
    """Convolution over time that sees no later frames; the first one is repeated before the start."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, t, in) -> (B, ceil(t / stride), out)."""
        padded = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return cast(Tensor, self.conv(padded)).transpose(1, 2)


class AudioStreams(nn.Module):
    """Encoder of audio features: several streams of local tokens, and a global one."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__()
        self.num_streams = dims.num_audio_tokens
        width = dims.dim // 4
        self.conv1_local = CausalConv(dims.audio_dim, self.num_streams * width)
        self.conv1_global = CausalConv(dims.audio_dim, width)
        self.conv2 = CausalConv(width, dims.dim // 2, _STREAM_STRIDES[0])
        self.conv3 = CausalConv(dims.dim // 2, dims.dim, _STREAM_STRIDES[1])
        self.final_linear = nn.Linear(dims.dim, dims.dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dims.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, t, audio_dim) -> local tokens (B, t / 4, N, D) and global ones (B, t / 4, D).

        The last local token of a latent frame is learned.
        """
        local = self.conv1_local(x).unflatten(-1, (self.num_streams, -1))  # (B, t, N - 1, D / 4)
        streams = local.transpose(1, 2).flatten(0, 1)
        tokens = self._reduce_frames(streams).unflatten(0, (-1, self.num_streams)).transpose(1, 2)
        padding = self.padding_tokens.expand(*tokens.shape[:2], -1, -1)
        global_tokens = self.final_linear(self._reduce_frames(self.conv1_global(x)))
        return torch.cat([tokens, padding], dim=2), global_tokens

    def _reduce_frames(self, x: Tensor) -> Tensor:
        """x (B, t, D / 4) -> (B, t / 4, D)."""
        for convolution in (self.conv2, self.conv3):
            x = convolution(_normalize(x))
        return _normalize(x)


def _normalize(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class CausalAudioEncoder(nn.Module):
    """Weighted sum of the audio model's layers, then `AudioStreams`."""

    def __init__(self, dims: TransformerDims) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, dims.num_audio_states, 1, 1))
        self.encoder = AudioStreams(dims)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, layers, audio_dim, t): see `AudioStreams.forward`, of t frames."""
        weights = F.silu(self.weights)
        mixed = (features * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1)
        return cast(tuple[Tensor, Tensor], self.encoder(mixed.transpose(1, 2)))


class AdaptiveModulation(nn.Module):
    """Linear that predicts a norm's shift and scale."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> scale and shift (2, B, T, D), float32."""
        shift, scale = self.linear(F.silu(x).to(self.linear.weight.dtype)).float().chunk(2, dim=-1)
        return torch.stack([scale, shift])


class InjectorProjection(nn.Module):
    """Keys, values and modulation of one injection."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.eps = dims.num_heads, dims.eps
        self.k = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.v = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.norm_k = RMSNorm(dims.dim, dims.eps)
        self.adain = AdaptiveModulation(dims.dim, dtype)

    def forward(self, tokens: Tensor, global_tokens: Tensor) -> AudioContext:
        """Return the `AudioContext` of tokens (B, T, N, D) and global_tokens (B, T, D)."""
        tokens = tokens.to(self.k.weight.dtype)
        k = rms_norm(self.k(tokens), self.norm_k.weight, self.eps).to(tokens.dtype)
        keys_values = torch.stack([k, self.v(tokens)]).unflatten(-1, (self.num_heads, -1))
        return AudioContext(keys_values, self.adain(global_tokens))


class AudioProjection(nn.Module):
    """Projection of a clip's audio features to the `AudioContext` of each injection."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.casual_audio_encoder = CausalAudioEncoder(dims)  # as it is spelled in checkpoints
        self.injectors = nn.ModuleDict(
            {str(index): InjectorProjection(dims, dtype) for index in range(len(dims.audio_layers))}
        )
        self.injector_indices = list(range(len(dims.audio_layers)))

    def layers(self) -> dict[str, nn.Module]:
        """Return the injections' layers by name, in the order in which they are called."""
        return {f"injectors.{index}": layer for index, layer in self.injectors.items()}

    def select_injectors(self, indices: Iterable[int]) -> None:
        """Drop all injections but these, which may repeat; `forward` then returns these, in this order."""
        self.injector_indices = list(indices)
        for index in set(self.injectors).difference(map(str, self.injector_indices)):
            del self.injectors[index]

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T, N, D) and the global ones (B, T, D) of a clip.

        features: (B, layers, audio_dim, 4 T). The clip's first column stands for the frames before the clip.
        """
        history = features[..., :1].expand(*features.shape[:-1], NUM_HISTORY_FRAMES)
        tokens, global_tokens = self.casual_audio_encoder(
            torch.cat([history, features], dim=-1).float()
        )
        return tokens[:, NUM_HISTORY_LATENTS:], global_tokens[:, NUM_HISTORY_LATENTS:]

    def forward(self, features: Tensor) -> list[AudioContext]:
        """Return the context of each injection for features (B, layers, audio_dim, 4 T) of a clip."""
        tokens, global_tokens = self.encode(features)
        contexts = {
            index: injector(tokens, global_tokens) for index, injector in self.injectors.items()
        }
        return [contexts[str(index)] for index in self.injector_indices]
