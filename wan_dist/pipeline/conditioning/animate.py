"""Conditioning of Animate: reference image, given frames, poses and faces of one clip.

Source: `WanAnimate` of the reference (Wan-Video/Wan2.2), without its rounding of pixels to bfloat16.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import (
    convert_image_to_tensor,
    encode_image_features,
    encode_on_first_rank,
    encode_videos,
    gather_chunks,
)
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.tasks.animate import DrivingVideo, iterate_clip_frames
from wan_dist.tasks.letterbox import fit_on_black
from wan_dist.tasks.source_video import VideoFacts
from wan_dist.weights.component import Component

_FACES_AT_ONCE = 4
_ONE_FRAME_BEFORE = (0, 0, 0, 0, 1, 0)
"""Padding (for `F.pad`) of latents (1, C, T, h, w)."""


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return all that one clip takes beside the text, on the ranks that encode.

    These are ``image_features``, ``extra_channels`` (1, 4 + 2 C, 1 + T, h, w): mask, latents of what is
    given, latents of the poses; and ``face`` with ``negative_face``, where there is a negative prompt.
    """
    driving = plan.driving
    assert isinstance(driving, DrivingVideo)
    image = fit_on_black(np.asarray(plan.images[0].convert("RGB")), (plan.width, plan.height))
    reference = convert_image_to_tensor(image)

    def encode(image_encoder: Component[nn.Module, ImageEncoderDims]) -> dict[str, Tensor]:
        features = encode_image_features(
            image_encoder, [reference], plan, report, session.model_cache
        ).to(report.device)
        return {"image_features": features, **_encode_faces(session, plan, driving, report)}

    tensors = encode_on_first_rank(session, encode)
    latents = encode_videos(
        session,
        config,
        plan,
        report,
        [
            lambda: iter([reference[None, :, None]]),
            lambda: gather_chunks(iterate_given_frames(plan, driving, first_frames)),
            lambda: gather_chunks(iterate_pixels(driving.pose, driving, plan.clip_index)),
        ],
        f"reference image and clip {plan.clip_index + 1} of the driving video",
    )
    if latents is not None:
        reference_latents, given, poses = latents
        mask = read_clip_mask(plan, driving)
        channels = [
            *prepend_reference(mask, reference_latents, given),
            F.pad(poses, _ONE_FRAME_BEFORE),  # the reference image has no pose
        ]
        tensors["extra_channels"] = torch.cat(channels, dim=1)
    return tensors


def prepend_reference(mask: Tensor, reference: Tensor, given: Tensor) -> list[Tensor]:
    """Return a mask (1, 4, T, h, w) and the latents of what is given after those of a reference image.

    The image's frame is given.
    """
    mask = F.pad(mask.to(given), _ONE_FRAME_BEFORE, value=1.0)
    return [mask, torch.cat([reference, given], dim=2)]


def _encode_faces(
    session: Session, plan: VideoPlan, driving: DrivingVideo, report: StageReport
) -> dict[str, Tensor]:
    """Return the vectors of the clip's face frames, and of no face for the negative prompt."""
    component = session.checkpoint.face_encoder
    assert component is not None
    with report.measure_stage("face", f"{plan.frame_num} frames of {component.dims.image_size}"):
        encoder = session.model_cache.get_or_load(
            "face", report.device, lambda: component.load(report.device)
        )
        frames = iterate_pixels(driving.face, driving, plan.clip_index)
        motion = []
        while piece := list(islice(frames, _FACES_AT_ONCE)):
            motion.append(encoder.encode_motion(torch.stack(piece)))
        faces = {"face": encoder.face_encoder(torch.cat(motion))}
        if plan.negative_prompt is not None:
            faces["negative_face"] = encoder.encode_still_face(plan.frame_num)
        del encoder
        free_memory()
    return faces


def iterate_pixels(
    video: VideoFacts, driving: DrivingVideo, clip_index: int, skip: int = 0
) -> Iterator[Tensor]:
    """Yield a clip's frames (3, H, W) in [-1, 1] of one of the driving videos, without the first ``skip``."""
    for frame in iterate_clip_frames(video, driving, clip_index, skip):
        yield convert_image_to_tensor(frame)


def iterate_given_frames(
    plan: VideoPlan, driving: DrivingVideo, first_frames: Tensor | None
) -> Iterator[Tensor]:
    """Yield what is given of a clip's frames (3, H, W): the end of the clip before it, the background."""
    if driving.background is None:
        yield from iterate_with_grey(plan, first_frames)
        return
    num_given = 0 if first_frames is None else first_frames.shape[1]
    if first_frames is not None:
        yield from first_frames.unbind(1)
    yield from iterate_pixels(driving.background, driving, plan.clip_index, num_given)


def iterate_with_grey(plan: VideoPlan, first_frames: Tensor | None) -> Iterator[Tensor]:
    """Yield a clip's frames (3, H, W): the end of the clip before it, then grey ones."""
    num_given = 0 if first_frames is None else first_frames.shape[1]
    if first_frames is not None:
        yield from first_frames.unbind(1)
    grey = torch.zeros(3, plan.height, plan.width)
    for _ in range(plan.frame_num - num_given):
        yield grey


def read_clip_mask(plan: VideoPlan, driving: DrivingVideo) -> Tensor:
    """Return the mask (1, 4, T, h, w) of a clip, 1 where a pixel is given.

    Channels are the frames of a latent frame; the first latent frame has a single one, four times. Of the
    person's mask, which is not rounded to 0 and 1, a latent pixel has the value of its first pixel.
    """
    rows, columns = plan.latent_shape[2:]
    num_given = plan.num_repeated_frames if plan.clip_index else 0
    mask = torch.zeros(plan.frame_num, rows, columns)
    mask[:num_given] = 1
    if driving.mask is not None:
        stride = plan.height // rows
        frames = iterate_clip_frames(driving.mask, driving, plan.clip_index, num_given)
        for index, frame in enumerate(frames, num_given):
            person = torch.from_numpy(frame[::stride, ::stride, 0].copy()).float() / 255
            mask[index] = 1 - person
    return fold_mask(mask)


def fold_mask(mask: Tensor) -> Tensor:
    """Return a mask (F, h, w) of frames as that of latent frames (1, 4, T, h, w); of the first four times."""
    mask = torch.cat([mask[:1].expand(4, -1, -1), mask[1:]])
    return mask.view(1, -1, 4, *mask.shape[1:]).transpose(1, 2)
