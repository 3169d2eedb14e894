"""Shape of a video's latents, and the number of its tokens, from sizes alone; no torch."""

from collections.abc import Sequence
from math import prod

from wan_dist.models.dims import TransformerDims
from wan_dist.planning.video_input import VideoInput
from wan_dist.tasks.animate import DrivingVideo
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.tasks.base import Task


def compute_latent_shape(video: VideoInput, task: Task) -> tuple[int, int, int, int]:
    """Return the shape (C, T, h, w) of the video's latents."""
    frame_stride, row_stride, column_stride = task.vae_stride
    latent_frames = (video.frame_num - 1) // frame_stride + 1
    if task.inputs.has_reference_frames:
        latent_frames += video.num_images
    rows, columns = video.height // row_stride, video.width // column_stride
    return task.latent_channels, latent_frames, rows, columns


def count_driving_tokens(
    driving: DrivingVideo | FollowedVideo | None, latent_shape: Sequence[int], task: Task
) -> int:
    """Return the number of tokens of a driving video that passes through the transformer, 0 without one.

    Where it is not known, its frames are taken to be as large as those of the video.
    """
    if isinstance(driving, FollowedVideo):
        return driving.num_tokens
    if not task.is_animate_2:
        return 0
    channels, num_frames, rows, columns = latent_shape
    return count_latent_tokens((channels, num_frames - 1, rows, columns), task.transformer_dims)


def count_latent_tokens(latent_shape: tuple[int, int, int, int], dims: TransformerDims) -> int:
    """Return the number of tokens of latents (C, T, h, w), and of the reference image before them."""
    num_frames, *sizes = (
        size // patch for size, patch in zip(latent_shape[1:], dims.patch, strict=True)
    )
    return (num_frames + bool(dims.ref_conv_in_dim)) * prod(sizes)
