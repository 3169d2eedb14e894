"""Cross-attention keys and values, and tokens of control inputs, projected once before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from wan_dist.models.animate_2 import SKIPPED_LAYER
from wan_dist.models.context import ContextProjection
from wan_dist.models.control import ControlTokens
from wan_dist.models.fused_block import ContextKV
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import all_gather
from wan_dist.pipeline.audio_contexts import project_audio
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.session import Session
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.weights.streaming import StreamingOptions


class ProjectedContexts(NamedTuple):
    """What a transformer takes beside the latents and the timestep, the same at all steps."""

    key_values: list[ContextKV]
    """Cross-attention's, of the prompt, and of the negative prompt if there is one."""
    control: ControlTokens
    driving: ContextKV | None = None
    """Cross-attention's, of a driving video that passes through the transformer."""


def project_contexts(
    session: Session,
    expert_index: int,
    conditioning: Conditioning,
    size: Sequence[int],
    report: StageReport,
    stage_name: str,
    *,
    is_streamed: bool = False,
) -> ProjectedContexts:
    """Return what a transformer takes of the conditioning, on every rank; ``size``: (T, h, w) of the latents.

    Each rank of the replica reads and computes its shard of the blocks, and the shards are all-gathered;
    control tokens are computed by all. Where weights are streamed, or the model cache does not hold them,
    they are off the device on return.
    """
    component, axis = session.checkpoint.context_projections[expert_index], session.groups.replica
    num_blocks = len(component.dims.context_block_names)
    blocks_per_rank = -(-num_blocks // axis.size)
    # Shards are of one size, as the all-gather needs: the last ones are padded with the last block.
    block_indices = [
        min(index, num_blocks - 1)
        for index in range(axis.rank * blocks_per_rank, (axis.rank + 1) * blocks_per_rank)
    ]

    def gather(local_kv: Tensor) -> Tensor:
        return all_gather(local_kv, axis).flatten(0, 1)[:num_blocks]

    with report.measure_stage(
        stage_name,
        f"keys and values of the text{'' if conditioning.image_features is None else ' and image'}",
    ):
        streaming = None
        if is_streamed:
            num_rounds = 1 if conditioning.driving_context is None else 2
            streaming = StreamingOptions(
                ContextProjection.layers, from_disk=True, num_rounds=num_rounds
            )
        model_cache = session.model_cache if streaming is None else ModelCache()
        slot = session.get_cache_slot("projection", expert_index)
        model_cache.evict_others(slot, expert_index)
        projection = model_cache.get_or_load(
            slot,
            expert_index,
            lambda: component.load(
                report.device,
                prepare_model=lambda model: model.select_blocks(block_indices),
                streaming=streaming,
            ),
        )
        contexts = _project(projection, conditioning, size, gather)
        del projection
        if not session.model_cache.is_persistent:
            free_memory()
    sounds = project_audio(session, conditioning, report, is_streamed=is_streamed)
    if not sounds:
        return contexts
    key_values = [
        replace(context, audio=sound)
        for context, sound in zip(contexts.key_values, sounds, strict=False)
    ]
    return contexts._replace(key_values=key_values)


def _project(
    projection: ContextProjection,
    conditioning: Conditioning,
    size: Sequence[int],
    gather: Callable[[Tensor], Tensor],
) -> ProjectedContexts:
    """Return what a loaded projection makes; ``gather`` brings the blocks of all ranks together."""
    texts = (conditioning.context, conditioning.negative_context)
    prompt_embeddings = [text for text in texts if text is not None]
    local_kvs = projection(prompt_embeddings, conditioning.image_features)
    control = projection.embed_control(conditioning.reference_latents, conditioning.cameras, size)
    image_kv = None if local_kvs[0].image is None else gather(local_kvs[0].image)
    faces = (conditioning.face, conditioning.negative_face)
    key_values = [
        ContextKV(gather(local_kv.text), image_kv, face)
        for local_kv, face in zip(local_kvs, faces, strict=False)
    ]
    if conditioning.driving_context is None:
        return ProjectedContexts(key_values, control)
    assert conditioning.driving_features is not None
    [local_kv] = projection([conditioning.driving_context], conditioning.driving_features)
    assert local_kv.image is not None
    driving = ContextKV(gather(local_kv.text), gather(local_kv.image))
    key_values[1:] = [replace(context, skipped_layer=SKIPPED_LAYER) for context in key_values[1:]]
    return ProjectedContexts(key_values, control, driving)
