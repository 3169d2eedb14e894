"""Text and images -> `Conditioning`: once in a replica, on its first rank, and sent to the others."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.models.image_encoder import encode_images
from wan_dist.models.text_encoder import TextEncoder, split_into_chunks
from wan_dist.models.transformer import ContextKV
from wan_dist.output.stage_report import Report
from wan_dist.parallel.collectives import all_gather, broadcast, broadcast_object
from wan_dist.parallel.fsdp import apply_fsdp
from wan_dist.pipeline import decode as vae
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import first_that_works, free_memory
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import Plan
from wan_dist.planning.vae_memory import Way
from wan_dist.runtime.log import logger
from wan_dist.sampling.noise import Conditioning, chunks_of_images, mask_of_images
from wan_dist.tasks.images import cover
from wan_dist.weights.checkpoint import Component
from wan_dist.weights.streaming import Streaming

_TELL_SECONDS = 60.0
"""Between two lines that say how far a batch's texts have come."""


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
            found["image_features"] = _look_at_images(image_encoder, plan, report, session.shelf).to(report.device)
        return found

    found = session.together(embed_and_look, "encode the prompt")
    if plan.images:
        found |= _encode_images(session, config, plan, report)

    def send() -> dict[str, Tensor | None]:
        return {field.name: broadcast(found.get(field.name), axis, report.device) for field in fields(Conditioning)}

    everywhere = session.together(send, "send what was encoded")
    context = everywhere.pop("context")
    assert context is not None
    return Conditioning(context=context, negative_context=everywhere.pop("negative_context"), **everywhere)


def project_contexts(
    session: Session,
    which: int,
    conditioning: Conditioning,
    report: Report,
    name: str,
    *,
    streamed: bool = False,
) -> list[ContextKV]:
    """Return a transformer's cross-attention k and v of the prompt, and of the negative one if there is one, on every rank.

    Every rank of the replica reads and computes its share of the blocks. Where weights are streamed, or the shelf does not keep them,
    they are gone from the device then.
    """
    component, axis = session.checkpoint.projections[which], session.groups.replica
    num_blocks = component.dims.num_layers
    each = -(-num_blocks // axis.size)
    own = [min(index, num_blocks - 1) for index in range(axis.rank * each, (axis.rank + 1) * each)]  # shares are of one size
    with report.stage(name, f"keys and values of the text{'' if conditioning.image_features is None else ' and image'}"):
        streaming = Streaming("blocks", from_disk=True, num_rounds=1) if streamed else None
        shelf = session.shelf if streaming is None else Shelf()
        place = session.place("projection", which)
        shelf.make_way(place, which)
        projection = shelf.take(
            place, which, lambda: component.load(report.device, spread=lambda model: model.keep(own), streaming=streaming)
        )
        prompts = [text for text in (conditioning.context, conditioning.negative_context) if text is not None]
        shares = projection(prompts, conditioning.image_features)
        texts = [all_gather(share.text, axis).flatten(0, 1)[:num_blocks] for share in shares]
        image = None if shares[0].image is None else all_gather(shares[0].image, axis).flatten(0, 1)[:num_blocks]
        del projection, shares
        if not session.shelf.keeps:
            free_memory()
    return [ContextKV(text, image) for text in texts]


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


def _look_at_images(image_encoder: Component[nn.Module, ImageEncoderDims], plan: Plan, report: Report, shelf: Shelf) -> Tensor:
    device = report.device if plan.arrangement.clip == "gpu" else torch.device("cpu")
    with report.stage("look", f"CLIP on {device.type}, {len(plan.images)} image{'s' if len(plan.images) > 1 else ''}"):
        clip = shelf.take("clip", device, lambda: image_encoder.load(device))
        features = encode_images(clip, [pixels(image) for image in plan.images], image_size=image_encoder.dims.image_size)
        del clip
        free_memory()
    return features


def _encode_images(session: Session, config: RunConfig, plan: Plan, report: Report) -> dict[str, Tensor]:
    """Return what the VAE makes of the images; in strips, one for each rank, where the ranks share that."""
    checkpoint, axis = session.checkpoint, session.groups.replica
    found: dict[str, Tensor] = {}

    def chunks() -> Iterator[Tensor]:
        if plan.task.known_first_frame:
            return iter([pixels(cover(plan.images[0], (plan.width, plan.height))).unsqueeze(1).unsqueeze(0)])
        first, *last = (pixels(image) for image in plan.images)
        return chunks_of_images(first, last[0] if last else None, frame_num=plan.frame_num, width=plan.width, height=plan.height)

    def work(way: Way) -> None:
        if axis.rank != 0 and way.name != "parallel":
            return  # the first rank goes on alone
        with report.stage("image", f"VAE {way}, " + ", ".join(f"{image.width}x{image.height}" for image in plan.images)):
            model = vae.load(checkpoint, config, way, report.device, session.shelf)
            device = next(model.parameters()).device
            latents = vae.encode(model, lambda: (chunk.to(device) for chunk in chunks()), way, axis).to(report.device)
            if plan.task.known_first_frame:
                found["known_latents"] = latents
            else:
                mask = mask_of_images(plan.latent_shape, has_last=len(plan.images) == 2).to(report.device)
                found["extra_channels"] = torch.cat([mask, latents], dim=1)

    def choose() -> list[Way]:
        ways = vae.find_ways(config, plan, checkpoint.vae.dims, report.device, axis, encode=True)
        if ways[0].name == "cpu" and config.memory.vae is None:  # sooner read the transformer again
            session.shelf.clear()
            ways = vae.find_ways(config, plan, checkpoint.vae.dims, report.device, axis, encode=True)
        return ways

    ways = session.together(choose, "choose how to encode the image")
    if first_that_works(
        ways, lambda way: session.together(lambda: work(way), "encode the image", exchanges=way.name == "parallel"), "encoding the image"
    ):
        report.ran_out("image")
    free_memory()
    return found


def pixels(image: Image.Image) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
