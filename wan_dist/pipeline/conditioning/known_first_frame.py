"""Conditioning of text and image to video (5B): the image is the first latent frame."""

from collections.abc import Iterator

from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import convert_image_to_tensor, encode_latents
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.tasks.images import crop_to_cover


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return ``known_latents`` on the ranks that encode the image."""
    first_frame = None if first_frames is None else first_frames[:, 0]
    latents = encode_latents(session, config, plan, report, lambda: _make_chunks(plan, first_frame))
    return {} if latents is None else {"known_latents": latents}


def _make_chunks(plan: VideoPlan, first_frame: Tensor | None) -> Iterator[Tensor]:
    if first_frame is None:
        first_frame = convert_image_to_tensor(
            crop_to_cover(plan.images[0], (plan.width, plan.height))
        )
    return iter([first_frame.unsqueeze(1).unsqueeze(0)])
