"""Memory of control inputs: a camera's tokens, and what they are computed with; no torch."""

from wan_dist.planning.workload import FLOAT_BYTES, Arrangement, Workload

_RAY_COPIES = 5
"""Tensors as large as a latent frame's rays that are alive at once while these are computed."""


def estimate_control_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of what controls a video, which stay from the first step to the last on each rank.

    These are the camera's tokens, of sharded experts those of both, or a driving video's keys and values in
    all blocks, with the float32 results that attention to it is added to.
    """
    dims = workload.model_dims.transformer
    num_experts = workload.num_experts if arrangement.shard_dit else 1
    token_bytes = workload.num_tokens * dims.dim * workload.itemsize
    driving_bytes = 2 * len(dims.block_names) * workload.driving_tokens * workload.itemsize
    if workload.driving_tokens:
        driving_bytes += workload.num_tokens * FLOAT_BYTES
    driving_bytes = driving_bytes * dims.dim // workload.num_sequence_parts
    return driving_bytes + (num_experts * token_bytes if dims.camera_in_dim else 0)


def list_camera_parts(workload: Workload) -> dict[str, int]:
    """Return the memory of embedding a camera: tokens of each latent frame, then of all; rays of one."""
    dims = workload.model_dims.transformer
    if not dims.camera_in_dim:
        return {}
    _, _, rows, columns = workload.latent_shape
    frame_bytes = _RAY_COPIES * rows * columns * dims.camera_in_dim * FLOAT_BYTES
    return {"camera": 2 * workload.num_tokens * dims.dim * workload.itemsize + frame_bytes}


def estimate_embedding_bytes(workload: Workload, num_own_tokens: int, side_bytes: int) -> int:
    """Return the bytes of a step's tokens while they are embedded.

    On ranks that share a sequence each embeds all tokens, then keeps ``num_own_tokens``; a reference image's
    are put before them. Of poses, and of them with the video's, there is one for each token. ``side_bytes``:
    of VACE's side branch, if there is one.
    """
    dims = workload.model_dims.transformer
    num_embedded = 2 * workload.num_tokens if dims.pose_dim or dims.audio_layers else 0
    is_spread = workload.num_sequence_parts > 1
    if is_spread:
        num_embedded += workload.num_tokens * (1 + bool(dims.ref_conv_in_dim)) + num_own_tokens
    embedded_bytes = num_embedded * dims.dim * workload.itemsize
    return embedded_bytes + (side_bytes if is_spread and dims.vace_layers else 0)
