"""Image conditioning of the transformer: CLIP features, a mask and VAE latents."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.models.image_encoder import encode_images
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.decode import choose_vae_strategies, encode_video, load_vae
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import free_memory, run_with_fallback
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan, VideoPlan
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.tasks.images import crop_to_cover
from wan_dist.weights.checkpoint import Component


def encode_image_features(
    image_encoder: Component[nn.Module, ImageEncoderDims],
    plan: RunPlan,
    report: StageReport,
    model_cache: ModelCache,
) -> Tensor:
    """Return the CLIP features (n, 257, image_dim) of the plan's n images."""
    device = report.device if plan.arrangement.clip == "gpu" else torch.device("cpu")
    with report.measure_stage(
        "look",
        f"CLIP on {device.type}, {len(plan.images)} image{'s' if len(plan.images) > 1 else ''}",
    ):
        clip_model = model_cache.get_or_load("clip", device, lambda: image_encoder.load(device))
        features = encode_images(
            clip_model,
            [convert_image_to_tensor(image) for image in plan.images],
            image_size=image_encoder.dims.image_size,
        )
        del clip_model
        free_memory()
    return features


def encode_image_latents(
    session: Session, config: RunConfig, plan: RunPlan, report: StageReport
) -> dict[str, Tensor]:
    """Return the VAE's conditioning of the images: ``known_latents``, or ``extra_channels``.

    With the parallel strategy each rank encodes a strip; otherwise the first rank encodes, and the others
    return an empty dict.
    """
    conditioning_tensors: dict[str, Tensor] = {}

    def run_strategy(strategy: VaeStrategy) -> None:
        conditioning_tensors.update(
            session.run_together(
                lambda: _encode_with_strategy(session, config, plan, report, strategy),
                "encode the image",
                uses_collectives=strategy.name == "parallel",
            )
        )

    strategies = session.run_together(
        lambda: choose_vae_strategies(
            config,
            plan,
            session.checkpoint.vae.dims,
            report.device,
            session.groups.replica,
            session.model_cache,
            is_encoding=True,
        ),
        "choose how to encode the image",
    )
    if run_with_fallback(strategies, run_strategy, "encoding the image"):
        report.record_out_of_memory("image")
    free_memory()
    return conditioning_tensors


def _encode_with_strategy(
    session: Session, config: RunConfig, plan: VideoPlan, report: StageReport, strategy: VaeStrategy
) -> dict[str, Tensor]:
    """Return the conditioning tensors of `encode_image_latents`, encoded with one strategy."""
    axis = session.groups.replica
    if axis.rank != 0 and strategy.name != "parallel":
        return {}  # the first rank encodes alone
    image_sizes = ", ".join(f"{image.width}x{image.height}" for image in plan.images)
    with report.measure_stage("image", f"VAE {strategy}, {image_sizes}"):
        vae_model = load_vae(
            session.checkpoint, config, strategy, report.device, session.model_cache
        )
        device = next(vae_model.parameters()).device
        latents = encode_video(
            vae_model, lambda: (chunk.to(device) for chunk in _make_chunks(plan)), strategy, axis
        ).to(report.device)
        if plan.task.has_fixed_first_frame:
            return {"known_latents": latents}
        mask = make_image_mask(plan.latent_shape, has_last_image=len(plan.images) == 2)
        return {"extra_channels": torch.cat([mask.to(report.device), latents], dim=1)}


def _make_chunks(plan: VideoPlan) -> Iterator[Tensor]:
    """Return the chunks (1, 3, n, H, W) to encode: a fixed first frame alone, or a video of the images."""
    if plan.task.has_fixed_first_frame:
        first_frame = crop_to_cover(plan.images[0], (plan.width, plan.height))
        return iter([convert_image_to_tensor(first_frame).unsqueeze(1).unsqueeze(0)])
    first_image, *last_images = (convert_image_to_tensor(image) for image in plan.images)
    return make_image_chunks(
        first_image,
        last_images[0] if last_images else None,
        frame_num=plan.frame_num,
        width=plan.width,
        height=plan.height,
    )


def convert_image_to_tensor(image: Image.Image) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def make_image_chunks(
    first_image: Tensor, last_image: Tensor | None, *, frame_num: int, height: int, width: int
) -> Iterator[Tensor]:
    """Yield a video, in the VAE encoder's chunks, of the images at its ends and zeros (mid-grey) between.

    Images are (3, any, any) in [-1, 1]; they are scaled to the video's size, bicubic and without
    antialiasing, as in the reference. Chunks are (1, 3, n, H, W): the first frame, then four at a time;
    only one chunk exists at once.
    """

    def resize_image(image: Tensor) -> Tensor:
        return F.interpolate(image.unsqueeze(0), size=(height, width), mode="bicubic").unsqueeze(2)

    yield resize_image(first_image)
    grey_chunk = first_image.new_zeros(1, 3, 4, height, width)
    for start in range(1, frame_num, 4):
        is_last_chunk = start + 4 >= frame_num
        yield (
            torch.cat([grey_chunk[:, :, :3], resize_image(last_image)], dim=2)
            if is_last_chunk and last_image is not None
            else grey_chunk
        )


def make_image_mask(latent_shape: tuple[int, int, int, int], *, has_last_image: bool) -> Tensor:
    """Return the mask (1, 4, T, h, w), which is 1 where a frame is given and 0 elsewhere.

    Channels are the frames of a latent frame; the first latent frame has a single one, four times.
    """
    _, num_latent_frames, rows, columns = latent_shape
    mask = torch.zeros(1, 4, num_latent_frames, rows, columns)
    mask[:, :, 0] = 1
    if has_last_image:
        mask[:, -1, -1] = 1
    return mask
