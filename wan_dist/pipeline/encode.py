"""Conditioning from text and images: encoded once per replica and broadcast from its first rank."""

from collections.abc import Callable
from dataclasses import fields

from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import broadcast
from wan_dist.pipeline.conditioning import (
    animate,
    animate_2,
    fun,
    image,
    known_first_frame,
    speech,
    vace,
)
from wan_dist.pipeline.input_cache import InputCache
from wan_dist.pipeline.session import Session
from wan_dist.pipeline.text_embeddings import embed_prompts
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.log import logger
from wan_dist.sampling.conditioning import Conditioning

InputEncoder = Callable[
    [Session, RunConfig, RunPlan, StageReport, Tensor | None], dict[str, Tensor]
]
INPUT_ENCODERS: dict[str, InputEncoder] = {
    "image": image.encode_inputs,
    "known_first_frame": known_first_frame.encode_inputs,
    "vace": vace.encode_inputs,
    "fun": fun.encode_inputs,
    "animate": animate.encode_inputs,
    "animate_2": animate_2.encode_inputs,
    "speech": speech.encode_inputs,
}
"""By the kind of a task's inputs; each returns fields of `Conditioning`, at least on the first rank.

The last argument are the frames (3, n, H, W) in [-1, 1] that a further clip starts from, None of the first.
"""


def _encode_inputs(
    session: Session, config: RunConfig, plan: RunPlan, report: StageReport
) -> dict[str, Tensor]:
    """Return what the inputs are encoded to, as in `INPUT_ENCODERS`, from the cache if they were before."""
    cache = session.run_together(lambda: InputCache(session, config, plan), "read the images")
    cached = session.run_together(cache.find, "look for encoded images")
    if cached is not None:
        logger.log(
            report.log_level, "image     read from the cache in %s", config.cache.resolve_folder()
        )
        return {name: tensor.to(report.device) for name, tensor in cached.items()}
    tensors = INPUT_ENCODERS[plan.task.inputs.kind](session, config, plan, report, None)
    if "image" not in (
        report.record.ran_out or ()
    ):  # else it was encoded in another way than planned
        cache.store(tensors)
    return tensors


def encode_conditioning(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None = None,
) -> Conditioning:
    """Return the conditioning of all steps, on every rank; encoders not cached are then off the device.

    ``first_frames`` (3, n, H, W) in [-1, 1] are those that a clip after the first starts from.
    """
    axis = session.groups.replica
    optional_prompts = {
        "context": plan.prompt,
        "negative_context": plan.negative_prompt,
        "driving_context": plan.driving_prompt,
    }
    prompts = {name: text for name, text in optional_prompts.items() if text is not None}

    def encode_prompts() -> dict[str, Tensor]:
        embeddings = embed_prompts(session, config, plan, prompts.values(), report)
        if axis.rank != 0:
            return {}
        if not plan.is_last_clip:
            session.prompt_embeddings |= embeddings
        return {name: embeddings[text].to(report.device) for name, text in prompts.items()}

    conditioning_tensors = session.run_together(encode_prompts, "encode the prompt")
    if first_frames is not None or plan.speech is not None:
        encode_inputs = INPUT_ENCODERS[plan.task.inputs.kind]
        conditioning_tensors |= encode_inputs(session, config, plan, report, first_frames)
    elif plan.images or plan.task.inputs.is_always_encoded:
        conditioning_tensors |= _encode_inputs(session, config, plan, report)

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
