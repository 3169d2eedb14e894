"""Write a full-size checkpoint with random bfloat16 weights in the published layout, to try a whole run without a download.

python bench/checkpoint.py --task t2v-1.3B FOLDER        # 15 GB; t2v-14B and A14B (both experts are one file): 41 GB; ti2v-5B: 25 GB
"""

import argparse
from pathlib import Path

import torch

from wan_dist.catalog import TASKS
from wan_dist.dims import TextEncoderDims, TransformerDims, VaeDims
from wan_dist.toy import CheckpointDims, make_checkpoint

UMT5_XXL = TextEncoderDims(num_layers=24, dim=4096, ffn_dim=10240, num_heads=64, head_dim=64, vocab_size=256384)
VAE = {16: VaeDims(dim=96, decoder_dim=96), 48: VaeDims(dim=160, decoder_dim=256, latent_dim=48, residual=True)}


def main() -> None:
    """Make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    tasks = [name for name, task in TASKS.items() if task.transformer and not task.looks_at_images]
    parser.add_argument("--task", default="t2v-1.3B", choices=tasks)
    options = parser.parse_args()
    task = TASKS[options.task]
    dims = CheckpointDims(transformer=TransformerDims(**vars(task.transformer)), text_encoder=UMT5_XXL, vae=VAE[task.latent_channels])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = "high_noise_model" if task.boundary else "."
    make_checkpoint(options.folder, dims, device=device, dtype=torch.bfloat16, transformer_folder=place)
    if task.boundary:
        (options.folder / "low_noise_model").symlink_to(place)


if __name__ == "__main__":
    main()
