"""Embeddings of prompts: from the cache on disk, from another replica, or from umT5."""

import json
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.text_encoder import TextEncoder, split_into_chunks
from wan_dist.output.stage_report import Report
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.fsdp import apply_fsdp
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import Plan
from wan_dist.runtime.log import logger
from wan_dist.weights.streaming import Streaming

_TELL_SECONDS = 60.0
"""Between two lines that say how far a batch's texts have come."""


def embed(session: Session, config: RunConfig, plan: Plan, prompts: Iterable[str], report: Report) -> dict[str, Tensor]:
    """Return the prompts' embeddings on the host of the replica's first rank, by prompt, and make those that are nowhere yet.

    The other ranks return an empty dict, while the first one may be at it for long.
    """
    cache = _prompt_cache(session, config, report.device)
    found = {text: context for text in prompts if (context := _find_text(session, cache, text)) is not None}
    made: dict[str, Tensor] = {}

    def hold(text: str, context: Tensor) -> None:
        made[text] = context
        if cache is not None:
            cache.put(text, context)

    _encode_missing(session, plan, [text for text in dict.fromkeys(prompts) if text not in found], report, hold)
    if found and not made and cache is not None:
        logger.log(report.level, "text      seen before, kept in %s", cache.folder)
    return found | made


def embed_ahead(session: Session, config: RunConfig, plan: Plan, prompts: Iterable[str], report: Report) -> None:
    """Make the embeddings of a batch's prompts that are nowhere yet; each is kept at once, so that a run that is ended goes on.

    Those that the prompt cache does not take are put into ``session.texts``, on the host. Ranks but the replica's first one return
    while that may be at it for hours: let them wait without a limit before they meet.
    """
    cache = session.prompt_cache = _prompt_cache(session, config, report.device)

    def hold(text: str, context: Tensor) -> None:
        if cache is None or not cache.put(text, context):
            session.texts[text] = context

    _encode_missing(session, plan, _lacking(session, cache, prompts), report, hold)


def share_texts(session: Session, prompts: Iterable[str], folder: Path) -> None:
    """After `embed_ahead`, give each replica the embeddings that others have made and it does not see; called by all ranks of the run.

    They go through ``folder``, which all see, and not where all see one prompt cache that holds them.
    """
    groups, cache = session.groups, session.prompt_cache
    if groups.dp.size == 1:
        return
    is_first = groups.replica.rank == 0
    lacking = set(_lacking(session, cache, prompts)) if is_first else set()
    wanted: set[str] = set().union(*groups.team.gather(lacking, "encode the prompts"))
    if not wanted:
        return
    if is_first:
        session.shared_texts = PromptCache(folder, session.text_encoder_digest, limit=2**62)
        for text in sorted(wanted - lacking):
            if (context := _find_text(session, cache, text)) is not None:
                session.shared_texts.put(text, context)
    groups.team.gather(None, "share the prompts' embeddings")


def _lacking(session: Session, cache: PromptCache | None, prompts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(prompts) if text not in session.texts and (cache is None or not cache.has(text))]


def _find_text(session: Session, cache: PromptCache | None, text: str) -> Tensor | None:
    """Return an embedding that was made before, by this batch or an earlier run."""
    if text in session.texts:
        return session.texts[text]
    caches = [each for each in (cache, session.prompt_cache, session.shared_texts) if each is not None]
    return next((context for each in caches if (context := each.get(text)) is not None), None)


def _prompt_cache(session: Session, config: RunConfig, device: torch.device) -> PromptCache | None:
    """Return the cache, on the replica's first rank."""
    folder = config.cache.folder()
    if folder is None or session.groups.replica.rank != 0:
        return None
    identity = [session.text_encoder_digest, config.dtype, session.checkpoint.transformers[0].dims.text_len, device.type]
    return _open_cache(folder, json.dumps(identity), int(config.cache.size_gib * 2**30))


@lru_cache
def _open_cache(folder: Path, identity: str, limit: int) -> PromptCache:
    """Return a cache that knows, for as long as the process lives, what was used."""
    return PromptCache(folder, identity, limit)


def _encode_missing(session: Session, plan: Plan, prompts: list[str], report: Report, hold: Callable[[str, Tensor], None]) -> None:
    """Encode the prompts that the replica's first rank lacks; ``hold`` is called there for each as soon as it is made, on the host."""
    axis = session.groups.replica
    missing = broadcast_object(prompts, axis)
    if not missing or not (axis.rank == 0 or plan.arrangement.shard_t5):
        return
    num_made, told = 0, time.monotonic()

    def take(text: str, context: Tensor) -> None:
        nonlocal num_made, told
        num_made += 1
        if axis.rank == 0:
            hold(text, context)
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                logger.info("text      %d of %d", num_made, len(missing))

    _encode_texts(session, plan, missing, report, take)


def _encode_texts(session: Session, plan: Plan, prompts: list[str], report: Report, take: Callable[[str, Tensor], None]) -> None:
    """Encode prompts; ``take`` is given each with its embedding (n, text_dim), on the host, as soon as it is made."""
    checkpoint = session.checkpoint
    spread: Callable[[nn.Module], None] | None = None
    if plan.arrangement.shard_t5 and (mesh := session.groups.replica_mesh) is not None:

        def spread(encoder: nn.Module) -> None:
            apply_fsdp(encoder, encoder.get_submodule("block").children(), mesh)

    component, text_len = checkpoint.text_encoder, checkpoint.transformers[0].dims.text_len
    is_streamed = plan.arrangement.t5 == "stream"
    device = torch.device("cpu") if plan.arrangement.t5 == "cpu" else report.device
    chunks = split_into_chunks(checkpoint.tokenizer, prompts, text_len, device) if is_streamed else []
    streaming = Streaming("block", from_disk=True, leave=("embed_tokens.",), num_rounds=len(chunks)) if is_streamed else None
    how = ", sharded" if plan.arrangement.shard_t5 else ", from disk" if is_streamed else ""
    with report.stage("text", f"umT5 on {device.type}{how}"):
        encode_text = TextEncoder(
            component.load(device, spread=spread, streaming=streaming),
            checkpoint.tokenizer,
            text_len=text_len,
            device=device,
            rows=partial(component.rows, "embed_tokens.weight") if is_streamed else None,
        )
        for chunk in chunks:
            for prompt, context in zip(chunk, encode_text.encode_by_block(chunk), strict=True):
                take(prompt, context)
        for prompt in prompts if not is_streamed else ():
            take(prompt, encode_text(prompt).cpu())
        del encode_text
        free_memory()
