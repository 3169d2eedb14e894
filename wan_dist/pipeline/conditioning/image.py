"""Conditioning of image to video: CLIP features, and a mask and latents as extra input channels."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import (
    convert_image_to_tensor,
    encode_image_features,
    encode_latents,
    encode_on_first_rank,
)
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.weights.component import Component


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return ``extra_channels``, and ``image_features`` where the model takes them, on the first rank."""
    first_frame = None if first_frames is None else first_frames[:, 0]

    def encode(image_encoder: Component[nn.Module, ImageEncoderDims]) -> dict[str, Tensor]:
        features = encode_image_features(
            image_encoder, _list_images(plan, first_frame), plan, report, session.model_cache
        )
        return {"image_features": features.to(report.device)}

    conditioning_tensors = encode_on_first_rank(session, encode)
    latents = encode_latents(session, config, plan, report, lambda: _make_chunks(plan, first_frame))
    if latents is not None:
        mask = make_image_mask(plan.latent_shape, has_last_image=len(plan.images) == 2)
        conditioning_tensors["extra_channels"] = torch.cat([mask.to(latents), latents], dim=1)
    return conditioning_tensors


def _list_images(plan: VideoPlan, first_frame: Tensor | None) -> list[Tensor]:
    if first_frame is not None:
        return [first_frame]
    return [convert_image_to_tensor(image) for image in plan.images]


def _make_chunks(plan: VideoPlan, first_frame: Tensor | None) -> Iterator[Tensor]:
    first_image, *last_images = _list_images(plan, first_frame)
    return make_image_chunks(
        first_image,
        last_images[0] if last_images else None,
        frame_num=plan.frame_num,
        width=plan.width,
        height=plan.height,
    )


def make_image_chunks(
    first_image: Tensor | None,
    last_image: Tensor | None,
    *,
    frame_num: int,
    height: int,
    width: int,
) -> Iterator[Tensor]:
    """Yield a video, in the VAE encoder's chunks, of the images at its ends and zeros (mid-grey) between.

    Images are (3, any, any) in [-1, 1]; they are scaled to the video's size, bicubic and without
    antialiasing, as in the reference. Chunks are (1, 3, n, H, W): the first frame, then four at a time;
    only one chunk exists at once.
    """

    def resize_image(image: Tensor) -> Tensor:
        return F.interpolate(image.unsqueeze(0), size=(height, width), mode="bicubic").unsqueeze(2)

    grey_chunk = torch.zeros(1, 3, 4, height, width)
    yield grey_chunk[:, :, :1] if first_image is None else resize_image(first_image)
    for start in range(1, frame_num, 4):
        is_last_chunk = start + 4 >= frame_num
        yield (
            torch.cat([grey_chunk[:, :, :3], resize_image(last_image)], dim=2)
            if is_last_chunk and last_image is not None
            else grey_chunk
        )


def make_image_mask(
    latent_shape: tuple[int, int, int, int], *, has_last_image: bool, has_first_image: bool = True
) -> Tensor:
    """Return the mask (1, 4, T, h, w), which is 1 where a frame is given and 0 elsewhere.

    Channels are the frames of a latent frame; the first latent frame has a single one, four times.
    """
    _, num_latent_frames, rows, columns = latent_shape
    mask = torch.zeros(1, 4, num_latent_frames, rows, columns)
    mask[:, :, 0] = has_first_image
    if has_last_image:
        mask[:, -1, -1] = 1
    return mask
