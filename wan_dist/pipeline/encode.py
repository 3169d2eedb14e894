"""Conditioning from text and images: encoded once in a replica, and broadcast from its first rank."""

from dataclasses import fields

from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import broadcast
from wan_dist.pipeline.image_conditioning import encode_image_features, encode_image_latents
from wan_dist.pipeline.session import Session
from wan_dist.pipeline.text_embeddings import embed_prompts
from wan_dist.planning.plan import RunPlan
from wan_dist.sampling.conditioning import Conditioning


def encode_conditioning(
    session: Session, config: RunConfig, plan: RunPlan, report: StageReport
) -> Conditioning:
    """Return what is the same for all steps, on every rank; encoders not cached are off the device then."""
    axis = session.groups.replica
    optional_prompts = {"context": plan.prompt, "negative_context": plan.negative_prompt}
    prompts = {name: text for name, text in optional_prompts.items() if text is not None}

    def encode_prompts_and_images() -> dict[str, Tensor]:
        embeddings = embed_prompts(session, config, plan, prompts.values(), report)
        encoded_tensors = (
            {name: embeddings[text].to(report.device) for name, text in prompts.items()}
            if axis.rank == 0
            else {}
        )
        image_encoder = session.checkpoint.image_encoder
        if axis.rank == 0 and plan.images and image_encoder is not None:
            encoded_tensors["image_features"] = encode_image_features(
                image_encoder, plan, report, session.model_cache
            ).to(report.device)
        return encoded_tensors

    conditioning_tensors = session.run_together(encode_prompts_and_images, "encode the prompt")
    if plan.images:
        conditioning_tensors |= encode_image_latents(session, config, plan, report)

    def broadcast_conditioning() -> dict[str, Tensor | None]:
        return {
            field.name: broadcast(conditioning_tensors.get(field.name), axis, report.device)
            for field in fields(Conditioning)
        }

    broadcast_tensors = session.run_together(broadcast_conditioning, "send what was encoded")
    context = broadcast_tensors.pop("context")
    assert context is not None
    return Conditioning(
        context=context,
        negative_context=broadcast_tensors.pop("negative_context"),
        **broadcast_tensors,
    )
