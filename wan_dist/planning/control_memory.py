"""Memory of control inputs: a camera's tokens, and what they are computed with; no torch."""

from wan_dist.planning.workload import FLOAT_BYTES, Arrangement, Workload

_RAY_COPIES = 5
"""Tensors as large as a latent frame's rays that are alive at once while these are computed."""


def estimate_control_bytes(workload: Workload, arrangement: Arrangement) -> int:
    """Return the bytes of the camera's tokens, which stay from the first step to the last on each rank.

    Of sharded experts both are loaded.
    """
    dims = workload.model_dims.transformer
    num_experts = workload.num_experts if arrangement.shard_dit else 1
    token_bytes = workload.num_tokens * dims.dim * workload.itemsize
    return num_experts * token_bytes if dims.camera_in_dim else 0


def list_camera_parts(workload: Workload) -> dict[str, int]:
    """Return the memory of embedding a camera: tokens of each latent frame, then of all; rays of one."""
    dims = workload.model_dims.transformer
    if not dims.camera_in_dim:
        return {}
    _, _, rows, columns = workload.latent_shape
    frame_bytes = _RAY_COPIES * rows * columns * dims.camera_in_dim * FLOAT_BYTES
    return {"camera": 2 * workload.num_tokens * dims.dim * workload.itemsize + frame_bytes}
