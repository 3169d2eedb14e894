"""Conditioning of the Fun models: images at the ends, a control video, a reference image, a camera.

What enters the model is as in VideoX-Fun (aigc-apps/VideoX-Fun): channels of what is not given are zeros,
not an encoded grey video, and so are the latents of a missing reference image and the features of a
missing image.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import (
    MakeChunks,
    convert_image_to_tensor,
    encode_image_features,
    encode_on_first_rank,
    encode_videos,
    gather_chunks,
)
from wan_dist.pipeline.conditioning.image import make_image_chunks, make_image_mask
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.tasks.fun import START_KEYS, fit_image
from wan_dist.tasks.source_video import SourceVideo, iterate_frames
from wan_dist.weights.component import Component

_WEIGHT_BITS = 11
"""Of OpenCV's fixed-point weights of a bilinear resize."""


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frame: Tensor | None,
) -> dict[str, Tensor]:
    """Return fields of `Conditioning` on the ranks that encode; ``first_frame`` is None."""
    dims = session.checkpoint.transformers[0].dims
    images = dict(zip(plan.image_keys, plan.images, strict=True))

    def encode(image_encoder: Component[nn.Module, ImageEncoderDims]) -> dict[str, Tensor]:
        features = _encode_features(image_encoder, session, config, plan, report, images)
        return {"image_features": features}

    tensors = encode_on_first_rank(session, encode)
    videos = _list_videos(plan, config.fit, images, takes_reference=dims.ref_conv_in_dim > 0)
    encoded: list[Tensor] | None = []
    if videos:
        names = {"control": "control video", "image": "images", "reference": "reference image"}
        description = " and ".join(names[name] for name in videos)
        encoded = encode_videos(session, config, plan, report, list(videos.values()), description)
    if encoded is None:
        return {}
    latents = dict(zip(videos, encoded, strict=True))
    device = report.device
    tensors["extra_channels"] = build_extra_channels(
        plan.task.inputs.channels,
        plan.latent_shape,
        latents,
        has_first_image=_find_first_image(images) is not None,
        has_last_image="last_frame" in images,
    ).to(device)
    if plan.task.inputs.has_known_first_frame and _find_first_image(images) is not None:
        tensors["known_latents"] = latents["image"][:, :, :1].contiguous()
    if dims.ref_conv_in_dim:
        channels, _, *size = plan.latent_shape
        missing = torch.zeros(1, channels, 1, *size, device=device)
        tensors["reference_latents"] = latents.get("reference", missing)
    if plan.camera is not None:
        tensors["cameras"] = torch.tensor(plan.camera, dtype=torch.float32, device=device)
    return tensors


def build_extra_channels(
    channels: tuple[str, ...],
    latent_shape: tuple[int, int, int, int],
    latents: dict[str, Tensor],
    *,
    has_first_image: bool,
    has_last_image: bool,
) -> Tensor:
    """Return the channels (1, C', T, h, w) behind the noisy latents, in the order of ``channels``.

    ``latent_shape``: (C, T, h, w). ``latents``: of the ``control`` video and the ``image`` video, as far as
    they are given; a single latent frame is the first one.
    """
    parts = {
        "mask": make_image_mask(
            latent_shape, has_last_image=has_last_image, has_first_image=has_first_image
        )
    }
    for name in ("control", "image"):
        parts[name] = torch.zeros(1, *latent_shape)
        if name in latents:
            parts[name][:, :, : latents[name].shape[2]] = latents[name].cpu()
    return torch.cat([parts[channel] for channel in channels], dim=1)


def _find_first_image(images: dict[str, Image.Image]) -> Image.Image | None:
    return next((images[key] for key in START_KEYS if key in images), None)


def _encode_features(
    encoder: Component[nn.Module, ImageEncoderDims],
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    images: dict[str, Image.Image],
) -> Tensor:
    """Return CLIP's features (1, 257, image_dim) of the reference or first image, zeros without any.

    Models with a mask see the first image as it is fitted to the video, others at its own size.
    """
    image = images.get("src_ref_images", _find_first_image(images))
    if image is None:
        num_tokens = (encoder.dims.image_size // encoder.dims.patch) ** 2 + 1
        return torch.zeros(1, num_tokens, encoder.dims.dim, device=report.device)
    if "mask" in plan.task.inputs.channels:
        image = fit_image(image, (plan.width, plan.height), config.fit)
    features = encode_image_features(
        encoder, [convert_image_to_tensor(image)], plan, report, session.model_cache
    )
    return features.to(report.device)


def _list_videos(
    plan: VideoPlan, fit: str, images: dict[str, Image.Image], *, takes_reference: bool
) -> dict[str, MakeChunks]:
    """Return what the VAE encodes, by name: control video, images at the ends, reference image."""
    size = (plan.width, plan.height)
    fitted = {
        key: convert_image_to_tensor(fit_image(image, size, fit)) for key, image in images.items()
    }
    first_image = next((fitted[key] for key in START_KEYS if key in fitted), None)
    last_image = fitted.get("last_frame")
    videos: dict[str, MakeChunks] = {}
    if (source := plan.source) is not None:
        videos["control"] = lambda: iterate_control_chunks(source)
    if first_image is not None and "mask" not in plan.task.inputs.channels:
        videos["image"] = lambda: iter([first_image[None, :, None]])
    elif first_image is not None or last_image is not None:
        videos["image"] = lambda: make_image_chunks(
            first_image,
            last_image,
            frame_num=plan.frame_num,
            width=plan.width,
            height=plan.height,
        )
    if takes_reference and "src_ref_images" in fitted:
        videos["reference"] = lambda: iter([fitted["src_ref_images"][None, :, None]])
    return videos


def iterate_control_chunks(source: SourceVideo) -> Iterator[Tensor]:
    """Yield a control video (1, 3, n, H, W) in [-1, 1], in the VAE encoder's chunks."""
    return gather_chunks(frame.float() / 127.5 - 1 for frame in iterate_control_frames(source))


def iterate_control_frames(source: SourceVideo) -> Iterator[Tensor]:
    """Yield the frames (3, H, W), uint8, of a control video, stretched to the size of the new one."""
    for frame in iterate_frames(source.video, source.frame_indices):
        yield torch.from_numpy(resize_bilinear(frame, source.size)).permute(2, 0, 1)


def resize_bilinear(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a uint8 frame (any, any, 3) stretched to ``size`` (width, height) as OpenCV's INTER_LINEAR does.

    Without antialiasing; weights are fixed-point numbers, and bits are dropped between rows and columns.
    """
    width, height = size
    if frame.shape[:2] == (height, width):
        return frame.copy()
    left, right, x_weights = _find_neighbours(frame.shape[1], width)
    top, bottom, y_weights = _find_neighbours(frame.shape[0], height)
    values = frame.astype(np.int64)
    rows = values[:, left] * x_weights[0][:, None] + values[:, right] * x_weights[1][:, None]
    rows >>= 4
    upper, lower = (
        rows[index] * weight[:, None, None] >> 16
        for index, weight in zip((top, bottom), y_weights, strict=True)
    )
    return (upper + lower + 2 >> 2).clip(0, 255).astype(np.uint8)


def _find_neighbours(
    old_length: int, new_length: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return the indices of each new pixel's neighbours on a side, and their weights."""
    positions = ((np.arange(new_length) + 0.5) * (old_length / new_length) - 0.5).astype(np.float32)
    first = np.floor(positions).astype(np.int64)
    fraction = positions - first
    fraction[(first < 0) | (first >= old_length - 1)] = 0
    first = first.clip(0, old_length - 1)
    scale = 1 << _WEIGHT_BITS
    weights = tuple(
        np.rint(weight * np.float32(scale)).astype(np.int64) for weight in (1 - fraction, fraction)
    )
    return first, (first + 1).clip(0, old_length - 1), (weights[0], weights[1])
