"""Conditioning of Animate-2: the character's image, given frames, and the driving video of one clip."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.animate import (
    fold_mask,
    iterate_with_grey,
    prepend_reference,
)
from wan_dist.pipeline.conditioning.encoders import (
    convert_image_to_tensor,
    encode_image_features,
    encode_on_first_rank,
    encode_videos,
    gather_chunks,
)
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.tasks.animate import iterate_clip_frames
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.tasks.letterbox import fit_on_black
from wan_dist.weights.component import Component


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return all that one clip takes beside the texts, on the ranks that encode.

    These are ``image_features``, ``driving_features``, ``extra_channels`` (1, 4 + C, 1 + T, h, w), the mask
    and latents of what is given, and ``driving_latents`` (1, C, T, h', w').
    """
    followed = plan.driving
    assert isinstance(followed, FollowedVideo)
    image = np.asarray(plan.images[0].convert("RGB"))
    reference = convert_image_to_tensor(fit_on_black(image, followed.size, shrinks_by_area=True))

    def encode(image_encoder: Component[nn.Module, ImageEncoderDims]) -> dict[str, Tensor]:
        images = [reference, next(iterate_driving_frames(followed, plan.clip_index))]
        features = encode_image_features(image_encoder, images, plan, report, session.model_cache)
        own, driving = features.to(report.device).split(1)
        return {"image_features": own, "driving_features": driving}

    tensors = encode_on_first_rank(session, encode)
    latents = encode_videos(
        session,
        config,
        plan,
        report,
        [
            lambda: iter([reference[None, :, None]]),
            lambda: gather_chunks(iterate_with_grey(plan, first_frames)),
            lambda: gather_chunks(iterate_driving_frames(followed, plan.clip_index)),
        ],
        f"reference image and clip {plan.clip_index + 1} of the driving video",
    )
    if latents is not None:
        reference_latents, given, tensors["driving_latents"] = latents
        mask = torch.zeros(plan.frame_num, *plan.latent_shape[2:])
        mask[: plan.num_repeated_frames if plan.clip_index else 0] = 1
        channels = prepend_reference(fold_mask(mask), reference_latents, given)
        tensors["extra_channels"] = torch.cat(channels, dim=1)
    return tensors


def iterate_driving_frames(followed: FollowedVideo, clip_index: int) -> Iterator[Tensor]:
    """Yield a clip's frames (3, H, W) in [-1, 1] of the driving video, each fitted on black."""
    for frame in iterate_clip_frames(followed.video, followed, clip_index):
        fitted = fit_on_black(frame, followed.driving_size, shrinks_by_area=True)
        yield convert_image_to_tensor(fitted)
