"""Write a full-size checkpoint with random bfloat16 weights in the published layout, to try a whole run without a download.

python bench/checkpoint.py --task t2v-1.3B FOLDER        # 15 GB; t2v-14B: 41 GB
"""

import argparse
from pathlib import Path

import torch

from wan_dist.catalog import TASKS
from wan_dist.models.text_encoder import TextEncoderDims
from wan_dist.models.transformer import TransformerDims
from wan_dist.models.vae import VaeDims
from wan_dist.toy import CheckpointDims, make_checkpoint

UMT5_XXL = TextEncoderDims(num_layers=24, dim=4096, ffn_dim=10240, num_heads=64, head_dim=64, vocab_size=256384)


def main() -> None:
    """Make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="t2v-1.3B", choices=[name for name, task in TASKS.items() if task.transformer])
    options = parser.parse_args()
    transformer = TransformerDims(**vars(TASKS[options.task].transformer))
    dims = CheckpointDims(transformer=transformer, text_encoder=UMT5_XXL, vae=VaeDims(dim=96, decoder_dim=96))
    options.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_checkpoint(options.folder, dims, device=device, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
