"""Prompt embeddings: from the cache on disk, from another replica, or from the umT5 text encoder."""

import json
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.text_encoder import TextEncoder, list_encoder_layers, split_prompts_into_chunks
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.fsdp import apply_fsdp
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.log import logger
from wan_dist.weights.streaming import StreamingOptions

_LOG_INTERVAL_SECONDS = 60.0
"""Interval between two log lines of a batch's progress in encoding its prompts."""


def embed_prompts(
    session: Session, config: RunConfig, plan: RunPlan, prompts: Iterable[str], report: StageReport
) -> dict[str, Tensor]:
    """Return the embeddings by prompt on the host of the replica's first rank; encode those not found.

    The other ranks return an empty dict at once; the first one may take long to encode.
    """
    cache = _open_prompt_cache(session, config, report.device)
    cached_embeddings = {
        prompt: context
        for prompt in prompts
        if (context := _find_embedding(session, cache, prompt)) is not None
    }
    new_embeddings: dict[str, Tensor] = {}

    def store_embedding(prompt: str, context: Tensor) -> None:
        new_embeddings[prompt] = context
        if cache is not None:
            cache.put(prompt, context)

    _encode_missing_prompts(
        session,
        plan,
        [prompt for prompt in dict.fromkeys(prompts) if prompt not in cached_embeddings],
        report,
        store_embedding,
    )
    if cached_embeddings and not new_embeddings and cache is not None:
        logger.log(
            report.log_level, "text      prompt embeddings read from the cache in %s", cache.folder
        )
    return cached_embeddings | new_embeddings


def embed_prompts_ahead(
    session: Session, config: RunConfig, plan: RunPlan, prompts: Iterable[str], report: StageReport
) -> None:
    """Encode a batch's prompts that have no embedding yet.

    Each is stored at once, so that a run that is stopped resumes. Those that the prompt cache does not take
    are put into ``session.prompt_embeddings``, on the host. The replica's other ranks return while its
    first one may encode for hours: let them wait without a timeout before they meet.
    """
    cache = session.prompt_cache = _open_prompt_cache(session, config, report.device)

    def store_embedding(prompt: str, context: Tensor) -> None:
        if cache is None or not cache.put(prompt, context):
            session.prompt_embeddings[prompt] = context

    _encode_missing_prompts(
        session, plan, _list_missing_prompts(session, cache, prompts), report, store_embedding
    )


def share_prompt_embeddings(session: Session, prompts: Iterable[str], folder: Path) -> None:
    """After `embed_prompts_ahead`, give each replica the embeddings that it lacks.

    Called by all ranks of the run. The embeddings are stored in ``folder``, which all replicas see, unless
    all see one prompt cache that holds them.
    """
    groups, cache = session.groups, session.prompt_cache
    if groups.dp.size == 1:
        return
    is_first = groups.replica.rank == 0
    missing_prompts = set(_list_missing_prompts(session, cache, prompts)) if is_first else set()
    wanted_prompts: set[str] = set().union(
        *groups.coordinator.gather(missing_prompts, "encode the prompts")
    )
    if not wanted_prompts:
        return
    if is_first:
        session.shared_prompt_cache = PromptCache(
            folder, session.text_encoder_digest, limit_bytes=2**62
        )
        for prompt in sorted(wanted_prompts - missing_prompts):
            if (context := _find_embedding(session, cache, prompt)) is not None:
                session.shared_prompt_cache.put(prompt, context)
    groups.coordinator.gather(None, "share the prompts' embeddings")


def _list_missing_prompts(
    session: Session, cache: PromptCache | None, prompts: Iterable[str]
) -> list[str]:
    return [
        prompt
        for prompt in dict.fromkeys(prompts)
        if prompt not in session.prompt_embeddings and (cache is None or not cache.has(prompt))
    ]


def _find_embedding(session: Session, cache: PromptCache | None, prompt: str) -> Tensor | None:
    """Return an embedding that this batch or an earlier run computed, None if there is none."""
    if prompt in session.prompt_embeddings:
        return session.prompt_embeddings[prompt]
    caches = [
        candidate
        for candidate in (cache, session.prompt_cache, session.shared_prompt_cache)
        if candidate is not None
    ]
    return next(
        (context for candidate in caches if (context := candidate.get(prompt)) is not None), None
    )


def _open_prompt_cache(
    session: Session, config: RunConfig, device: torch.device
) -> PromptCache | None:
    """Return the cache on the replica's first rank, None on the others or if there is no folder."""
    folder = config.cache.resolve_folder()
    if folder is None or session.groups.replica.rank != 0:
        return None
    identity = [
        session.text_encoder_digest,
        config.dtype,
        session.checkpoint.transformers[0].dims.text_len,
        device.type,
    ]
    return _open_prompt_cache_once(folder, json.dumps(identity), int(config.cache.size_gib * 2**30))


@lru_cache
def _open_prompt_cache_once(folder: Path, identity: str, limit_bytes: int) -> PromptCache:
    """Return a cache that records, for the lifetime of the process, which entries were used."""
    return PromptCache(folder, identity, limit_bytes)


def _encode_missing_prompts(
    session: Session,
    plan: RunPlan,
    prompts: list[str],
    report: StageReport,
    store_embedding: Callable[[str, Tensor], None],
) -> None:
    """Encode the prompts that the replica's first rank lacks.

    ``store_embedding`` is called there with each prompt and its embedding, on the host, as soon as it is
    encoded.
    """
    axis = session.groups.replica
    missing_prompts = broadcast_object(prompts, axis)
    if not missing_prompts or not (axis.rank == 0 or plan.arrangement.shard_t5):
        return
    num_encoded, logged_at_seconds = 0, time.monotonic()

    def handle_embedding(prompt: str, context: Tensor) -> None:
        nonlocal num_encoded, logged_at_seconds
        num_encoded += 1
        if axis.rank == 0:
            store_embedding(prompt, context)
            if time.monotonic() - logged_at_seconds > _LOG_INTERVAL_SECONDS:
                logged_at_seconds = time.monotonic()
                logger.info("text      %d of %d", num_encoded, len(missing_prompts))

    _encode_prompts(session, plan, missing_prompts, report, handle_embedding)


def _encode_prompts(
    session: Session,
    plan: RunPlan,
    prompts: list[str],
    report: StageReport,
    handle_embedding: Callable[[str, Tensor], None],
) -> None:
    """Encode prompts; ``handle_embedding`` is called with each and its embedding.

    The embedding (n, text_dim) is on the host, and handed over as soon as it is encoded.
    """
    checkpoint = session.checkpoint
    shard_encoder: Callable[[nn.Module], None] | None = None
    if plan.arrangement.shard_t5 and (mesh := session.groups.replica_mesh) is not None:

        def shard_encoder(encoder: nn.Module) -> None:
            apply_fsdp(encoder, list_encoder_layers(encoder).values(), mesh)

    component, text_len = checkpoint.text_encoder, checkpoint.transformers[0].dims.text_len
    is_streamed = plan.arrangement.t5 == "stream"
    device = torch.device("cpu") if plan.arrangement.t5 == "cpu" else report.device
    chunks = (
        split_prompts_into_chunks(checkpoint.tokenizer, prompts, text_len, device)
        if is_streamed
        else []
    )
    streaming = (
        StreamingOptions(
            list_encoder_layers,
            from_disk=True,
            skip_prefixes=("embed_tokens.",),
            num_rounds=len(chunks),
        )
        if is_streamed
        else None
    )
    placement_text = ", from disk" if is_streamed else ""
    if plan.arrangement.shard_t5:
        placement_text = ", sharded"
    read_embedding_rows = (
        partial(component.read_parameter_rows, "embed_tokens.weight") if is_streamed else None
    )
    with report.measure_stage("text", f"umT5 on {device.type}{placement_text}"):
        encode_text = TextEncoder(
            component.load(device, prepare_model=shard_encoder, streaming=streaming),
            checkpoint.tokenizer,
            text_len=text_len,
            device=device,
            read_embedding_rows=read_embedding_rows,
        )
        for chunk in chunks:
            for prompt, context in zip(chunk, encode_text.encode_by_block(chunk), strict=True):
                handle_embedding(prompt, context)
        for prompt in prompts if not is_streamed else ():
            handle_embedding(prompt, encode_text(prompt).cpu())
        del encode_text
        free_memory()
