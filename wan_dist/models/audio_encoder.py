"""Audio encoder: wav2vec2 of the transformers library, whose states become features of each video frame.

Source: wav2vec2 (arXiv:2006.11477), and `AudioEncoder` of the reference (Wan-Video/Wan2.2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.dims import AudioEncoderDims

_VARIANCE_EPS = 1e-7
_STEPS_AT_ONCE = 1500
"""Steps, of 20 ms, whose convolutions are computed together: they take most of the memory, and are local."""


def build_audio_encoder(dims: AudioEncoderDims) -> nn.Module:
    """Return wav2vec2 in float32, without values where the default device is meta."""
    # Its import takes 3 s, which runs without sound need not wait for.
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=dims.dim,
        num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads,
        intermediate_size=dims.ffn_dim,
        conv_dim=dims.conv_dims,
        conv_kernel=dims.conv_kernels,
        conv_stride=dims.conv_strides,
        num_feat_extract_layers=len(dims.conv_dims),
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=dims.position_taps,
        num_conv_pos_embedding_groups=dims.position_groups,
        layer_norm_eps=dims.eps,
        apply_spec_augment=False,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        attn_implementation="sdpa",
    )
    return Wav2Vec2Model(config)


def normalize_samples(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the samples (n,) with mean 0 and variance 1, as wav2vec2 takes them."""
    normalized: npt.NDArray[np.float32] = (samples - samples.mean()) / np.sqrt(
        samples.var() + _VARIANCE_EPS
    )
    return normalized


@torch.no_grad()
def encode_audio(
    encoder: nn.Module,
    dims: AudioEncoderDims,
    samples: npt.NDArray[np.float32],
    num_vectors: int,
    columns: Sequence[int],
) -> Tensor:
    """Return the features (1, states, D, len(columns)), float32, of the whole audio at 16 kHz.

    The states are the input of each layer, and the last layer's output after the encoder's norm. Each is
    interpolated to ``num_vectors``, of which ``columns`` are taken; beyond the end they are zeros.
    """
    model: Any = encoder  # a library's, whose parts have no types
    hidden = _convolve(model, dims, torch.from_numpy(normalize_samples(samples)))
    features: list[Tensor] = []

    def keep_state(state: Tensor) -> None:
        features.append(_select_columns(state, num_vectors, columns))

    # transformers below 5 and from 5 on differ in whether the last of `hidden_states` has passed the norm.
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: keep_state(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.encoder.layers
    ]
    try:
        keep_state(model.encoder(hidden).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(features).unsqueeze(0)


def _convolve(model: Any, dims: AudioEncoderDims, samples: Tensor) -> Tensor:
    """Return the first layer's input (1, steps, D) before positions are added, of samples (n,)."""
    stride, window = dims.step_samples, dims.window_samples
    num_steps = dims.count_steps(len(samples))
    pieces = [
        samples[start * stride : (min(start + _STEPS_AT_ONCE, num_steps) - 1) * stride + window]
        for start in range(0, num_steps, _STEPS_AT_ONCE)
    ]
    return torch.cat(
        [
            model.feature_projection(model.feature_extractor(piece.unsqueeze(0)).transpose(1, 2))[0]
            for piece in pieces
        ],
        dim=1,
    )


def _select_columns(state: Tensor, num_vectors: int, columns: Sequence[int]) -> Tensor:
    """Return columns (D, n) of a state (1, steps, D) that is interpolated to ``num_vectors``."""
    vectors = F.interpolate(
        state.transpose(1, 2), size=num_vectors, mode="linear", align_corners=True
    ).squeeze(0)
    inside = [column for column in columns if column < num_vectors]
    return F.pad(vectors[:, inside], (0, len(columns) - len(inside)))
