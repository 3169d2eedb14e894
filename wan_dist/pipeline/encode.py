"""Text and images -> `Conditioning`: once in a replica, on its first rank, and sent to the others."""

from dataclasses import fields

from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import Report
from wan_dist.parallel.collectives import broadcast
from wan_dist.pipeline.image_conditioning import encode_image_features, encode_image_latents
from wan_dist.pipeline.session import Session
from wan_dist.pipeline.text_embeddings import embed
from wan_dist.planning.plan import Plan
from wan_dist.sampling.conditioning import Conditioning


def encode(session: Session, config: RunConfig, plan: Plan, report: Report) -> Conditioning:
    """Return what stays the same for all steps, on every rank; the encoders are gone from the device then."""
    axis = session.groups.replica
    texts = {"context": plan.prompt, "negative_context": plan.negative_prompt}
    prompts = {name: text for name, text in texts.items() if text is not None}

    def embed_and_look() -> dict[str, Tensor]:
        embeddings = embed(session, config, plan, prompts.values(), report)
        found = {name: embeddings[text].to(report.device) for name, text in prompts.items()} if axis.rank == 0 else {}
        image_encoder = session.checkpoint.image_encoder
        if axis.rank == 0 and plan.images and image_encoder is not None:
            found["image_features"] = encode_image_features(image_encoder, plan, report, session.shelf).to(report.device)
        return found

    found = session.together(embed_and_look, "encode the prompt")
    if plan.images:
        found |= encode_image_latents(session, config, plan, report)

    def send() -> dict[str, Tensor | None]:
        return {field.name: broadcast(found.get(field.name), axis, report.device) for field in fields(Conditioning)}

    everywhere = session.together(send, "send what was encoded")
    context = everywhere.pop("context")
    assert context is not None
    return Conditioning(context=context, negative_context=everywhere.pop("negative_context"), **everywhere)
