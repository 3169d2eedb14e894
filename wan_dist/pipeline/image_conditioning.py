"""Images -> what the transformer is given of them: CLIP features, a mask, latents."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ImageEncoderDims
from wan_dist.models.image_encoder import encode_images
from wan_dist.output.stage_report import Report
from wan_dist.pipeline import decode as vae
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import first_that_works, free_memory
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import Plan
from wan_dist.planning.vae_memory import Way
from wan_dist.tasks.images import cover
from wan_dist.weights.checkpoint import Component


def encode_image_features(image_encoder: Component[nn.Module, ImageEncoderDims], plan: Plan, report: Report, shelf: Shelf) -> Tensor:
    """Return CLIP's features (n, 257, image_dim) of the plan's n images."""
    device = report.device if plan.arrangement.clip == "gpu" else torch.device("cpu")
    with report.stage("look", f"CLIP on {device.type}, {len(plan.images)} image{'s' if len(plan.images) > 1 else ''}"):
        clip = shelf.take("clip", device, lambda: image_encoder.load(device))
        features = encode_images(clip, [pixels(image) for image in plan.images], image_size=image_encoder.dims.image_size)
        del clip
        free_memory()
    return features


def encode_image_latents(session: Session, config: RunConfig, plan: Plan, report: Report) -> dict[str, Tensor]:
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


def chunks_of_images(first: Tensor, last: Tensor | None, *, frame_num: int, height: int, width: int) -> Iterator[Tensor]:
    """Yield a video of the images (3, any, any) in [-1, 1] at its ends and zeros, mid-grey, between, in the encoder's chunks.

    Chunks are (1, 3, n, H, W): the first frame, then four at a time, of which only one chunk exists at once. Images are scaled to the
    video's size, bicubic and without antialiasing, as in the reference.
    """

    def scaled(image: Tensor) -> Tensor:
        return F.interpolate(image.unsqueeze(0), size=(height, width), mode="bicubic").unsqueeze(2)

    yield scaled(first)
    grey = first.new_zeros(1, 3, 4, height, width)
    for start in range(1, frame_num, 4):
        is_end = start + 4 >= frame_num
        yield torch.cat([grey[:, :, :3], scaled(last)], dim=2) if is_end and last is not None else grey


def mask_of_images(latent_shape: tuple[int, int, int, int], *, has_last: bool) -> Tensor:
    """Return (1, 4, T, h, w): 1 where a frame is given. Channels are the frames of a latent frame; the first has one, four times."""
    _, num_latents, rows, columns = latent_shape
    mask = torch.zeros(1, 4, num_latents, rows, columns)
    mask[:, :, 0] = 1
    if has_last:
        mask[:, -1, -1] = 1
    return mask
