"""Shape of a video's latents, and the number of its tokens, from sizes alone; no torch."""

from collections.abc import Sequence
from dataclasses import replace

from wan_dist.models.dims import TransformerDims
from wan_dist.planning.video_input import VideoInput
from wan_dist.planning.workload import Workload
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


def count_latent_tokens(
    latent_shape: tuple[int, int, int, int], dims: TransformerDims, num_context_latents: int = 0
) -> int:
    """Return the number of tokens of latents (C, T, h, w), of a reference image and of the frames before.

    ``num_context_latents``: latent frames before a clip of speech to video; its 19 are one frame, a quarter
    and four sixteenths, see `models.speech.FramePacker`.
    """
    num_frames, rows, columns = (
        size // patch for size, patch in zip(latent_shape[1:], dims.patch, strict=True)
    )
    num_references = bool(dims.ref_conv_in_dim) + bool(dims.audio_layers)
    num_tokens = (num_frames + num_references) * rows * columns
    if num_context_latents > 1:
        num_tokens += sum(
            num_packed * (rows // factor) * (columns // factor)
            for num_packed, factor in ((1, 1), (1, 2), (4, 4))
        )
    return num_tokens


def shorten_workload_frames(workload: Workload, num_fewer_frames: int) -> Workload | None:
    """Return the workload with ``num_fewer_frames`` latent frames fewer, None if none would be left."""
    channels, num_frames, rows, columns = workload.latent_shape
    if num_fewer_frames >= num_frames - workload.num_reference_frames:
        return None
    latent_shape = (channels, num_frames - num_fewer_frames, rows, columns)
    return replace(
        workload,
        latent_shape=latent_shape,
        num_tokens=count_latent_tokens(
            latent_shape, workload.model_dims.transformer, workload.num_context_latents
        ),
    )
