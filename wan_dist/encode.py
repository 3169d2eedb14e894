"""Text and images -> `Conditioning`: once in a replica, on its first rank, and sent to the others."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wan_dist import vae
from wan_dist.config import RunConfig
from wan_dist.dims import ImageEncoderDims
from wan_dist.images import cover
from wan_dist.log import logger
from wan_dist.memory import first_that_works, free_memory
from wan_dist.models.image_encoder import encode_images
from wan_dist.models.text_encoder import TextEncoder
from wan_dist.models.transformer import ContextKV
from wan_dist.parallel.collectives import all_gather, broadcast, broadcast_object
from wan_dist.parallel.fsdp import apply_fsdp
from wan_dist.plan import Plan
from wan_dist.prompts import PromptCache, digest_of_files
from wan_dist.report import Report
from wan_dist.sampling.conditioning import Conditioning, chunks_of_images, mask_of_images
from wan_dist.session import Session
from wan_dist.shelf import Shelf
from wan_dist.streaming import Streaming
from wan_dist.ways import Way
from wan_dist.weights.checkpoint import Checkpoint, Component


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
    """Return the prompts' embeddings on the replica's first rank, by prompt, and make those that the session and earlier runs lack."""
    checkpoint, axis = session.checkpoint, session.groups.replica
    cache = _prompt_cache(checkpoint, config, report.device) if axis.rank == 0 else None
    found = {text: session.texts[text] for text in prompts if text in session.texts}
    kept = {text: context for text in prompts if text not in found and cache is not None and (context := cache.get(text)) is not None}
    missing = broadcast_object([text for text in dict.fromkeys(prompts) if text not in found and text not in kept], axis)
    made: dict[str, Tensor] = {}
    if missing and (axis.rank == 0 or plan.arrangement.shard_t5):
        made = dict(zip(missing, _encode_texts(session, plan, missing, report), strict=True))
    elif kept:
        logger.log(report.level, "text      seen before, kept in %s", cache.folder if cache is not None else "")
    if cache is not None:
        for text, context in made.items():
            cache.put(text, context)
    return found | kept | made


def _prompt_cache(checkpoint: Checkpoint, config: RunConfig, device: torch.device) -> PromptCache | None:
    folder = config.cache.folder()
    if folder is None:
        return None
    component, tokenizer = checkpoint.text_encoder, Path(checkpoint.tokenizer.name_or_path)
    files = [*component.files.paths, *(file for file in tokenizer.iterdir() if file.is_file())]
    identity = [digest_of_files(files), config.dtype, checkpoint.transformers[0].dims.text_len, device.type]
    return PromptCache(folder, json.dumps(identity), int(config.cache.size_gib * 2**30))


def _encode_texts(session: Session, plan: Plan, prompts: list[str], report: Report) -> list[Tensor]:
    checkpoint = session.checkpoint
    spread: Callable[[nn.Module], None] | None = None
    if plan.arrangement.shard_t5 and (mesh := session.groups.replica_mesh) is not None:

        def spread(encoder: nn.Module) -> None:
            apply_fsdp(encoder, encoder.get_submodule("block").children(), mesh)

    component = checkpoint.text_encoder
    device = torch.device("cpu") if plan.arrangement.t5 == "cpu" else report.device
    how = ", sharded" if plan.arrangement.shard_t5 else ", from disk" if plan.arrangement.t5 == "stream" else ""
    with report.stage("text", f"umT5 on {device.type}{how}"):
        if plan.arrangement.t5 == "stream":
            streaming = Streaming("block", from_disk=True, leave=("embed_tokens.",), num_rounds=len(prompts))
            encoder = component.load(device, streaming=streaming)
        else:
            encoder = component.load(device, spread=spread)
        encode_text = TextEncoder(
            encoder,
            checkpoint.tokenizer,
            text_len=checkpoint.transformers[0].dims.text_len,
            device=device,
            rows=partial(component.rows, "embed_tokens.weight") if plan.arrangement.t5 == "stream" else None,
        )
        found = [encode_text(prompt) for prompt in prompts]
        del encode_text, encoder
        free_memory()
    return found


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
        if ways[0].name == "cpu" and config.memory.vae is None and session.shelf.clear():  # sooner read the transformer again
            ways = vae.find_ways(config, plan, checkpoint.vae.dims, report.device, axis, encode=True)
        return ways

    ways = session.together(choose, "choose how to encode the image")
    if first_that_works(ways, lambda way: session.together(lambda: work(way), "encode the image"), "encoding the image"):
        report.ran_out("image")
    free_memory()
    return found


def pixels(image: Image.Image) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
