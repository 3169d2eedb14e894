"""Fit of the linear map that previews are made with, by least squares on finished videos.

    python -m wan_dist.run task=NAME jobs=prompts.txt output.save_tensor=true output.dir=videos
    python -m bench.preview_map videos

prints the factors and the bias of `wan_dist.models.vae.preview_map` for the VAE of these videos, and how much
of the frames' variance they explain.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Latents (C, T, h, w) of a video, and its frames (3, F, H, W) in [-1, 1]."""


def fit_preview_map(pairs: Iterable[Pair]) -> tuple[Tensor, Tensor, float]:
    """Return the factors (C, 3), the bias (3,) and the share of the variance that they explain."""
    latent_rows, color_rows = zip(*(_pair_pixels(*pair) for pair in pairs), strict=True)
    latents, colors = torch.cat(latent_rows).double(), torch.cat(color_rows).double()
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
    solution = torch.linalg.lstsq(inputs, colors).solution
    residual = (inputs @ solution - colors).square().sum()
    total = (colors - colors.mean(0)).square().sum()
    return solution[:-1], solution[-1], 1 - float(residual / total)


def shrink_frames(frames: Tensor, num_latent_frames: int, size: tuple[int, int]) -> Tensor:
    """Return frames (3, F, H, W) as (3, T, h, w): the mean of what each latent stands for."""
    chunks = [frames[:, :1], *frames[:, 1:].split(4, dim=1)][:num_latent_frames]
    means = torch.stack([chunk.mean(1) for chunk in chunks], dim=1)
    return torch.nn.functional.adaptive_avg_pool2d(means, size)


def _pair_pixels(latents: Tensor, frames: Tensor) -> Pair:
    """Return the latents (N, C) and the colours (N, 3) of all places."""
    colors = shrink_frames(frames, latents.shape[1], (latents.shape[2], latents.shape[3]))
    return latents.flatten(1).T, colors.flatten(1).T


def read_pairs(folder: Path) -> Iterable[Pair]:
    """Yield latents and frames of the videos in a folder that have both."""
    for latents_file in sorted(folder.glob("*.latents.safetensors")):
        frames_file = folder / latents_file.name.replace(".latents.safetensors", ".safetensors")
        if frames_file.exists():
            yield load_file(latents_file)["latents"], load_file(frames_file)["video"]


def main(arguments: list[str]) -> None:
    """Print the map of a folder of videos."""
    factors, bias, share = fit_preview_map(read_pairs(Path(arguments[0])))
    for row in factors.tolist():
        sys.stdout.write(f"({', '.join(f'{value:.4f}' for value in row)}),\n")
    sys.stdout.write(f"bias ({', '.join(f'{value:.4f}' for value in bias.tolist())})\n")
    sys.stdout.write(f"{share:.1%} of the variance\n")


if __name__ == "__main__":
    main(sys.argv[1:])
