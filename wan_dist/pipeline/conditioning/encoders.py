"""Encoding of a task's inputs with CLIP and the VAE, on the ranks that the plan assigns."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
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
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.weights.component import Component

MakeChunks = Callable[[], Iterator[Tensor]]
"""Returns the chunks (1, 3, n, H, W) of a video in [-1, 1]: its first frame, then four frames at a time."""


def encode_on_first_rank(
    session: Session,
    encode: Callable[[Component[nn.Module, ImageEncoderDims]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return what ``encode`` makes with the image encoder on the replica's first rank.

    Empty on other ranks, and for models without an image encoder.
    """
    image_encoder = session.checkpoint.image_encoder

    def encode_or_wait() -> dict[str, Tensor]:
        if session.groups.replica.rank != 0 or image_encoder is None:
            return {}
        return encode(image_encoder)

    return session.run_together(encode_or_wait, "encode the image", uses_collectives=False)


def encode_image_features(
    image_encoder: Component[nn.Module, ImageEncoderDims],
    images: Sequence[Tensor],
    plan: RunPlan,
    report: StageReport,
    model_cache: ModelCache,
) -> Tensor:
    """Return the CLIP features (n, 257, image_dim) of n images (3, any, any) in [-1, 1]."""
    device = report.device if plan.arrangement.clip == "gpu" else torch.device("cpu")
    with report.measure_stage(
        "look",
        f"CLIP on {device.type}, {len(images)} image{'s' if len(images) > 1 else ''}",
    ):
        clip_model = model_cache.get_or_load("clip", device, lambda: image_encoder.load(device))
        features = encode_images(clip_model, list(images), image_size=image_encoder.dims.image_size)
        del clip_model
        free_memory()
    return features


def encode_latents(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    make_chunks: MakeChunks,
) -> Tensor | None:
    """Return the VAE's latents (1, C, T, h, w) of the images' video; see `encode_videos`."""
    image_sizes = [f"{image.width}x{image.height}" for image in plan.images]
    description = ", ".join(image_sizes) or f"the last frame of clip {plan.clip_index}"
    latents = encode_videos(session, config, plan, report, [make_chunks], description)
    return None if latents is None else latents[0]


def encode_videos(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    videos: Sequence[MakeChunks],
    description: str,
) -> list[Tensor] | None:
    """Return the VAE's latents (1, C, T, h, w) of each video, on the ranks that encode them.

    With the parallel strategy each rank encodes a strip and has the result; otherwise the first rank does,
    and the others return None. ``description`` of the videos is logged.
    """
    results: list[list[Tensor] | None] = []

    def encode_with_strategy(strategy: VaeStrategy) -> list[Tensor] | None:
        axis = session.groups.replica
        if axis.rank != 0 and strategy.name != "parallel":
            return None  # the first rank encodes alone
        with report.measure_stage("image", f"VAE {strategy}, {description}"):
            vae_model = load_vae(
                session.checkpoint, config, strategy, report.device, session.model_cache
            )
            device = next(vae_model.parameters()).device
            return [
                encode_video(
                    vae_model,
                    lambda make_chunks=make_chunks: (chunk.to(device) for chunk in make_chunks()),  # type: ignore[misc]
                    strategy,
                    axis,
                ).to(report.device)
                for make_chunks in videos
            ]

    def run_strategy(strategy: VaeStrategy) -> None:
        results.append(
            session.run_together(
                lambda: encode_with_strategy(strategy),
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
    return results[-1]


def gather_chunks(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield frames (3, H, W) as chunks (1, 3, n, H, W): the first one, then four at a time."""
    num_frames = 1
    while chunk := list(islice(frames, num_frames)):
        yield torch.stack(chunk, dim=1).unsqueeze(0)
        num_frames = 4


def convert_image_to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
