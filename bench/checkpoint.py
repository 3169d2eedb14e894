"""Random checkpoint at full size: bfloat16 weights in the published layout, for runs without a download.

    python bench/checkpoint.py --task t2v-1.3B FOLDER
    python bench/checkpoint.py --task ti2v-5B OTHER --text-encoder-of FOLDER    # links to a text encoder

It takes 15 GB of disk for t2v-1.3B, 25 GB for ti2v-5B, and 41 GB for t2v-14B and A14B, both experts of which
are one file; with the text encoder of another folder 11 GB less.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.random_checkpoint import make_checkpoint
from wan_dist.tasks.registry import TASKS

_HEADER_BYTES = 2**20
"""Bytes reserved for the header, whose size is not known before the tensors are drawn."""
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def save_in_turn(tensors: Iterable[tuple[str, torch.Tensor]], file: Path) -> None:
    """Write a safetensors file with one tensor at a time in memory; the header, padded, is written last."""
    header: dict[str, object] = {}
    end = 0
    with file.open("wb") as stream:
        stream.seek(8 + _HEADER_BYTES)
        for name, tensor in tensors:
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.seek(0)
        stream.write(
            _HEADER_BYTES.to_bytes(8, "little") + json.dumps(header).encode().ljust(_HEADER_BYTES)
        )


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="t2v-1.3B", choices=TASKS)
    parser.add_argument("--text-encoder-of", type=Path)
    options = parser.parse_args()
    task = TASKS[options.task]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = "high_noise_model" if task.expert_boundary else "."
    settings = {
        "device": device,
        "dtype": torch.bfloat16,
        "transformer_folder": place,
        "text_encoder_of": options.text_encoder_of,
    }
    torch.serialization.set_crc32_options(False)  # they take as long as the rest
    make_checkpoint(options.folder, task.model_dims, save=save_in_turn, **settings)
    if task.expert_boundary:
        (options.folder / "low_noise_model").symlink_to(place)


if __name__ == "__main__":
    main()
