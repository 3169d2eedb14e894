"""Scenes that were held out of training, and videos of them."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toy.denoiser import DIMS, CaptionEncoder
from toy.judge import Verdict, judge
from toy.render import NUM_FRAMES, SIZE, render
from toy.scenes import Scene, all_scenes, caption
from wan_dist.models.vae.model import WanVae, split_frames_into_chunks
from wan_dist.models.vae.plain import decode_latents
from wan_dist.pipeline.decode import convert_to_uint8_frames
from wan_dist.sampling.noise import NoiseSource

LATENT_SIZE = (DIMS.vae.latent_dim, (NUM_FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
"""(C, T, h, w) of the toy's videos."""
_BATCH = 16
"""Videos that are decoded at once."""

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From noise (B, C, T, h, w), whose first frame may be known, whether it is (B), and captions to latents."""


def draw_held_out(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return ``count`` scenes that were held out of training, with a caption each."""
    chance = random.Random(seed)
    scenes = [scene for scene in all_scenes() if scene.is_held_out]
    return [(scene, caption(scene, chance)) for scene in chance.sample(scenes, count)]


def draw_first_frame(scene: Scene, number: int) -> Tensor:
    """Return the first frame (H, W, 3), uint8, of a rendered video of video ``number``'s scene."""
    drawn = render([scene], random.Random(number), torch.device("cpu"))
    return convert_to_uint8_frames(drawn[0])[0]


@torch.no_grad()
def encode_first_frames(vae: WanVae, frames: Tensor) -> Tensor:
    """Return normalised latents (B, C, 1, h, w) of frames (B, 3, 1, H, W) in [-1, 1]."""
    return vae.encode(split_frames_into_chunks(frames))


@torch.no_grad()
def make_videos(
    sample: Sampler,
    asked: Sequence[tuple[Scene, str]],
    encode: CaptionEncoder,
    vae: WanVae,
    *,
    is_given: bool,
) -> list[NDArray[np.uint8]]:
    """Return a video (F, H, W, 3) of each caption; seeds and first frames are those of bench/toy_quality.py.

    With ``is_given`` each video is given its first frame.
    """
    videos = []
    for start in range(0, len(asked), _BATCH):
        some = asked[start : start + _BATCH]
        noise = torch.cat(
            [NoiseSource(LATENT_SIZE, seed=start + index).draw() for index in range(len(some))]
        ).to(encode.device)
        if is_given:
            frames = torch.stack(
                [draw_first_frame(scene, start + index) for index, (scene, _) in enumerate(some)]
            )
            frames = frames.permute(0, 3, 1, 2).unsqueeze(2).to(encode.device) / 127.5 - 1
            noise[:, :, :1] = encode_first_frames(vae, frames)
        given = torch.full((len(some),), is_given, device=encode.device)
        latents = sample(noise, given, encode([text for _, text in some]))
        mean, std = vae.get_latent_statistics(latents)
        videos += [
            convert_to_uint8_frames(video.clamp(-1, 1)).cpu().numpy()
            for video in decode_latents(vae, latents * std + mean)
        ]
    return videos


def judge_videos(
    videos: Sequence[NDArray[np.uint8]], asked: Sequence[tuple[Scene, str]]
) -> list[Verdict]:
    """Return what is right in each video."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(judge, videos, [scene for scene, _ in asked]))
