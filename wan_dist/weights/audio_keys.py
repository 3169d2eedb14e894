"""Key map of the audio encoder: names of the transformers library to those of a file."""

from collections.abc import Collection

from wan_dist.weights.key_maps import KeyMap, TensorSource

_CONV = "encoder.pos_conv_embed.conv"
_EARLIER_NAMES = {
    f"{_CONV}.parametrizations.weight.original0": f"{_CONV}.weight_g",
    f"{_CONV}.parametrizations.weight.original1": f"{_CONV}.weight_v",
}
"""Of the weight-normed convolution, in files of earlier releases."""


def map_audio_encoder(keys: Collection[str]) -> KeyMap:
    """Key map of wav2vec2 in a file of the transformers library, of a recent release or an earlier one.

    Names begin with ``wav2vec2.`` where the file has a head for recognition, which is ignored.
    """
    prefix = "wav2vec2." if any(key.startswith("wav2vec2.") for key in keys) else ""
    names = _EARLIER_NAMES if f"{prefix}{_CONV}.weight_g" in keys else {}
    unused = ("lm_head.", f"{prefix}masked_spec_embed")
    return KeyMap(
        lambda name: (TensorSource(prefix + names.get(name, name)),),
        lambda key: key.startswith(unused),
    )
