"""Checkpoint export of models in the original layout, the reverse of loading."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.models.dims import TransformerDims
from wan_dist.weights.key_maps import KeyMap

_CONFIG_KEYS = (
    "num_layers",
    "dim",
    "ffn_dim",
    "num_heads",
    "in_dim",
    "out_dim",
    "freq_dim",
    "text_len",
    "eps",
)


def export_tensors(
    tensors: Iterable[tuple[str, Tensor]], key_map: KeyMap
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, given by our names, with the checkpoint's keys, on the CPU.

    One of our tensors may be several in the checkpoint, and several one.
    """
    parts_by_key: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in tensors:
        sources = key_map.find_sources(name)
        for source, part in zip(sources, value.chunk(len(sources)), strict=True):
            parts_by_key[source.key][source.part_index] = part.to("cpu", copy=True)
            if len(parts_by_key[source.key]) == source.num_parts:
                parts = parts_by_key.pop(source.key)
                yield source.key, torch.cat([parts[number] for number in range(source.num_parts)])


def write_transformer_config(dims: TransformerDims, folder: Path) -> None:
    """Write a transformer's config.json."""
    model_type = "t2v" if dims.in_dim == dims.out_dim else "i2v"
    config = {"_class_name": "WanModel", "model_type": model_type} | {
        key: getattr(dims, key) for key in _CONFIG_KEYS
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
