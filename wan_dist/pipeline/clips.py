"""Clips of a video: each clip after the first starts from the last decoded frames of the previous one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from wan_dist.parallel.collectives import broadcast
from wan_dist.pipeline.denoise import VideoInProgress, make_latents
from wan_dist.planning.file_names import name_latents
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.log import logger


@torch.no_grad()
def make_clips(video: VideoInProgress) -> Iterator[tuple[VideoInProgress, Tensor]]:
    """Encode and denoise each clip of the video, and yield it with its latents (C, T, h, w), on every rank.

    The caller decodes and writes a clip before it requests the next one.
    """
    try:
        clip = video
        yield clip, make_latents(clip)
        for clip_index in range(1, video.plan.num_clips):
            begin_clip = partial(_begin_clip, video, clip_index, clip.first_frames)
            clip = video.session.run_together(begin_clip, "begin a clip")
            yield clip, make_latents(clip)
    except BaseException:
        video.writer.close()
        raise


def _describe_clip(plan: RunPlan, clip_index: int) -> dict[str, Any]:
    """Return the fields of a plan that differ in a clip of another length, as the last one may have."""
    if plan.driving is None or plan.driving.count_frames(clip_index) == plan.frame_num:
        return {}
    frame_num = plan.driving.count_frames(clip_index)
    channels, num_latents, *size = plan.latent_shape
    new_num_latents = num_latents - (plan.frame_num - frame_num) // plan.task.vae_stride[0]
    return {
        "frame_num": frame_num,
        "latent_shape": (channels, new_num_latents, *size),
        "num_tokens": plan.num_tokens // num_latents * new_num_latents,
    }


def _begin_clip(
    video: VideoInProgress, clip_index: int, earlier_frames: Tensor | None
) -> VideoInProgress:
    """Return the next clip, with its saved progress restored.

    ``earlier_frames`` are those that the clip before it started from, and count where clips are shorter than
    what they start from. All go to every rank as the decoder's float32: the 8 bits of the video file would
    lose precision.
    """
    axis, device = video.session.groups.replica, video.session.device
    first_frames = cast(Tensor, broadcast(video.writer.last_frames, axis, device)).cpu()
    if earlier_frames is not None:
        num_frames = video.plan.num_repeated_frames
        first_frames = torch.cat([earlier_frames, first_frames], dim=1)[:, -num_frames:]
    video.resume_state.begin_clip(clip_index, axis, device)
    # An image that the first clip starts from is not used again, but a character's is.
    images = () if video.plan.task.inputs.takes_clips else video.plan.images
    plan = replace(
        video.plan, clip_index=clip_index, images=images, **_describe_clip(video.plan, clip_index)
    )
    logger.log(
        video.report.log_level,
        "clip      %d of %d, from frame %d",
        clip_index + 1,
        plan.num_clips,
        plan.first_frame_index + plan.new_frames.start + 1,
    )
    return replace(
        video,
        plan=plan,
        report=video.report.for_clip(clip_index + 1),
        latents_file=video.result_file.with_name(name_latents(video.result_file.stem, clip_index)),
        first_frames=first_frames,
    )
