"""Conditioning of VACE: masked source video, mask and reference images as channels of their own.

Sources: `WanVace` of the reference (Wan-Video/Wan2.1), and VACE (arXiv:2503.07598).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import (
    MakeChunks,
    convert_image_to_tensor,
    encode_videos,
    gather_chunks,
)
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.tasks.images import compute_covering_size
from wan_dist.tasks.source_video import SourceVideo, VideoFacts, iterate_frames

_MASK_THRESHOLD = 0.5
"""Values of the mask above which a pixel is generated."""


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return ``extra_channels``, the VACE context, on the ranks that encode; ``first_frames`` is None."""
    size = (plan.width, plan.height)
    references = [
        fit_on_white(convert_image_to_tensor(image), size).unsqueeze(1) for image in plan.images
    ]
    videos: list[MakeChunks] = [
        lambda frame=frame: iter([frame.unsqueeze(0)])  # type: ignore[misc]
        for frame in references
    ]
    source = plan.source
    if source is None:  # everything is generated, from mid-grey: both parts are the same
        videos.append(lambda: _make_grey_chunks(plan))
    else:
        videos += [
            lambda: iterate_masked_chunks(source, size, keep=True),
            lambda: iterate_masked_chunks(source, size, keep=False),
        ]
    names = ["source video"] if source is not None else []
    names += (
        [f"{len(references)} reference image{'s' * (len(references) > 1)}"] if references else []
    )
    latents = encode_videos(
        session, config, plan, report, videos, " and ".join(names) or "an empty video"
    )
    if latents is None:
        return {}
    inactive, reactive = latents[len(references)], latents[-1]
    mask = read_mask_channels(plan)
    context = build_vace_context(latents[: len(references)], inactive, reactive, mask.to(inactive))
    return {"extra_channels": context}


def build_vace_context(
    references: Iterable[Tensor], inactive: Tensor, reactive: Tensor, mask: Tensor
) -> Tensor:
    """Return the VACE context (1, 2 C + 64, r + T, h, w).

    ``references``: latents (1, C, 1, h, w) of r images; ``inactive`` and ``reactive`` (1, C, T, h, w):
    latents of what is kept and of what is generated; ``mask`` (1, 64, T, h, w).
    """
    context = torch.cat([inactive, reactive, mask], dim=1)
    num_other_channels = context.shape[1] - inactive.shape[1]
    reference_contexts = [
        F.pad(latents, (0, 0) * 3 + (0, num_other_channels)) for latents in references
    ]
    return torch.cat([*reference_contexts, context], dim=2)


def fit_on_white(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image (3, any, any) in [-1, 1] scaled to fit into ``size`` (width, height), white around it.

    Bilinear and without antialiasing, as in the reference; one of that size is returned unchanged.
    """
    width, height = size
    if image.shape[1:] == (height, width):
        return image
    scale = min(height / image.shape[1], width / image.shape[2])
    new_height, new_width = int(scale * image.shape[1]), int(scale * image.shape[2])
    resized = F.interpolate(
        image.unsqueeze(0), size=(new_height, new_width), mode="bilinear", align_corners=False
    ).squeeze(0)
    canvas = torch.ones(3, height, width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas[:, top : top + new_height, left : left + new_width] = resized
    return canvas


def resize_to_cover(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a uint8 frame (3, any, any) scaled to cover ``size`` (width, height), its centre cropped.

    Bicubic with antialiasing, computed on the bytes, as in the reference.
    """
    width, height = size
    if frame.shape[1:] == (height, width):
        return frame
    new_width, new_height = compute_covering_size((frame.shape[2], frame.shape[1]), size)
    resized = F.interpolate(
        frame.unsqueeze(0), size=(new_height, new_width), mode="bicubic", antialias=True
    )
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return resized[0, :, top : top + height, left : left + width]


def iterate_resized_frames(
    video: VideoFacts, frame_indices: Iterable[int], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield frames of a video as `resize_to_cover` makes them, (3, H, W) uint8."""
    for frame in iterate_frames(video, tuple(frame_indices)):
        yield resize_to_cover(torch.from_numpy(np.array(frame)).permute(2, 0, 1), size)


def iterate_masked_chunks(
    source: SourceVideo, size: tuple[int, int], *, keep: bool
) -> Iterator[Tensor]:
    """Yield the source video, in the VAE encoder's chunks, with zeros (mid-grey) in a part of it.

    ``keep``: what the mask keeps is shown; otherwise what it has generated. Chunks are (1, 3, n, H, W) in
    [-1, 1].
    """
    masks = iterate_masks(source, size)

    def iterate_parts() -> Iterator[Tensor]:
        for frame in iterate_resized_frames(source.video, source.frame_indices, size):
            is_generated = next(masks) > _MASK_THRESHOLD
            shown = ~is_generated if keep else is_generated
            yield (frame.float() / 127.5 - 1) * shown

    yield from gather_chunks(iterate_parts())


def iterate_masks(source: SourceVideo, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the mask of each frame, (1, H, W) in [0, 1]: 1 where the video is generated."""
    if source.mask is None:
        for _ in source.frame_indices:
            yield torch.ones(1, size[1], size[0])
        return
    for frame in iterate_resized_frames(source.mask, source.mask_indices, size):
        yield ((frame[:1].float() / 127.5 - 1 + 1) / 2).clamp(0, 1)


def read_mask_channels(plan: VideoPlan) -> Tensor:
    """Return the mask as channels (1, 64, T, h, w): the 8 x 8 pixels of a latent pixel.

    Of all frames, T at even distances count, as with `nearest-exact` interpolation.
    """
    num_latents, rows, columns = plan.num_video_latents, *plan.latent_shape[2:]
    row_pixels, column_pixels = plan.height // rows, plan.width // columns
    if plan.source is None:
        return torch.ones(1, row_pixels * column_pixels, num_latents, rows, columns)
    wanted = (int((index + 0.5) * plan.frame_num / num_latents) for index in range(num_latents))
    source = replace(
        plan.source, frame_indices=tuple(plan.source.frame_indices[index] for index in wanted)
    )
    masks = list(iterate_masks(source, (plan.width, plan.height)))
    channels = F.pixel_unshuffle(torch.stack(masks), row_pixels)  # (T, 64, h, w)
    return channels.transpose(0, 1).unsqueeze(0)


def _make_grey_chunks(plan: VideoPlan) -> Iterator[Tensor]:
    grey = torch.zeros(3, plan.height, plan.width)
    yield from gather_chunks(grey for _ in range(plan.frame_num))
