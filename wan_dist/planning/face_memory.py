"""Memory of Animate's motion and face encoders; no torch."""

from itertools import pairwise

from wan_dist.models.dims import FaceEncoderDims
from wan_dist.planning.workload import FLOAT_BYTES

_FRAMES_AT_ONCE = 4
"""As in models/face_encoder.py."""
_NUM_COPIES = 5
"""Copies of the first residual block's input: blurred and padded ones; 4.5 were measured on an H200."""


def list_face_parts(dims: FaceEncoderDims) -> dict[str, int]:
    """Return the bytes of weights and activations on the device of the replica's first rank."""
    frame_bytes = dims.image_size**2 * dims.channels[0] * FLOAT_BYTES
    return {
        "weights": count_face_encoder_bytes(dims),
        "activations": _NUM_COPIES * _FRAMES_AT_ONCE * frame_bytes,
    }


def count_face_encoder_bytes(dims: FaceEncoderDims) -> int:
    """Return the bytes of Animate's motion and face encoders, float32."""
    width, hidden = dims.feature_dim, dims.hidden_dim
    num_parameters = 4 * dims.channels[0] + dims.channels[-1] * width * 16
    for in_dim, out_dim in pairwise(dims.channels):
        num_parameters += 9 * in_dim * (in_dim + out_dim) + in_dim * out_dim + in_dim + out_dim
    num_parameters += (dims.num_linears - 1) * width * (width + 1)
    num_parameters += dims.motion_dim * (width + 1) + width * dims.motion_dim
    num_parameters += dims.num_heads * hidden * (3 * width + 1) + 2 * hidden * (3 * hidden + 1)
    return (num_parameters + (hidden + 1) * dims.out_dim + dims.out_dim) * FLOAT_BYTES
