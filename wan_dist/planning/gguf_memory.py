"""Memory of transformer blocks whose weights stay in a GGUF file's blocks, from its header; no torch."""

import mmap
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from wan_dist.models.dims import TransformerDims
from wan_dist.planning.parameter_bytes import count_all_blocks_bytes, count_bytes_by_block
from wan_dist.planning.workload import FLOAT_BYTES, GIB, Arrangement, CompressedBlocks, Workload
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.gguf_header import BLOCK_SIZES, GGUF_MAGIC, count_row_bytes, read_gguf_header

DECODED_VALUES = 2**23
"""Values that are decoded at once; as in models/kernels/gguf_blocks.py."""
_NUM_COPIES = 4
"""Copies of these values in float32: bits, values, scaled ones, and less their minimum."""
DECODING_BYTES = _NUM_COPIES * DECODED_VALUES * FLOAT_BYTES

_BLOCK_LINEAR = re.compile(
    r"(?:^|\.)((?:vace_|face_adapter\.fuser_)?blocks\.\d+)\."
    r"(?:linear1_q|linear1_kv|linear2|self_attn|attn1|ffn|cross_attn\.[qo]|attn2\.to_(?:q|out\.0)|(?:before|after)_proj|proj_(?:in|out))\."
    r".*weight$"
)
"""Weights of a transformer block in either layout, but for those of the keys and values of contexts."""

_AUDIO_LINEAR = re.compile(r"(?:^|\.)audio_injector\.injector\.(\d+)\.[qo]\.weight$")

TensorTypes = Mapping[str, tuple[tuple[int, ...], str]]
"""Shapes and types of a file's tensors by name."""


def count_compressed_blocks(
    experts: Sequence[TensorTypes], dims: TransformerDims, itemsize: int, num_changed: int | None
) -> CompressedBlocks | None:
    """Return what the blocks of a transformer take if their weights stay compressed, of two experts at most.

    None if no weight can, or a file is of a larger model. ``num_changed``: how many of them LoRAs change, or
    None for all.
    """
    largest_bytes, most_bytes, num_weights = 0, 0, 0
    for tensors in experts:
        # What a block of the run's dtype takes, less what its weights have in fewer bits.
        bytes_by_block = Counter(count_bytes_by_block(dims, itemsize))
        for name, (shape, type_name) in tensors.items():
            block = _find_block(name, dims)
            if block is None or block not in bytes_by_block:
                continue
            if type_name in BLOCK_SIZES and len(shape) == 2:
                row_bytes = count_row_bytes(shape[1], type_name)
                bytes_by_block[block] -= prod(shape) * itemsize - shape[0] * row_bytes
                num_weights += 1
        if min(bytes_by_block.values()) < 0:
            return None  # the file is of a larger model
        largest_bytes = max(largest_bytes, *bytes_by_block.values())
        most_bytes = max(most_bytes, bytes_by_block.total())
    if not num_weights:
        return None
    # Of VACE's first block, or of one that takes audio.
    num_projections = 2 * dims.dim if dims.vace_layers or dims.audio_layers else 0
    return CompressedBlocks(
        block_bytes=largest_bytes,
        all_bytes=most_bytes,
        decoded_bytes=(6 * dims.dim + 2 * dims.ffn_dim + num_projections) * dims.dim * itemsize,
        num_weights=num_weights,
        num_changed=num_weights if num_changed is None else num_changed,
    )


def _find_block(name: str, dims: TransformerDims) -> str | None:
    """Return the block that a linear's weight is of; those that add audio have names of their own."""
    if match := _AUDIO_LINEAR.search(name):
        index = int(match[1])
        return f"blocks.{dims.audio_layers[index]}" if index < len(dims.audio_layers) else None
    return match[1] if (match := _BLOCK_LINEAR.search(name)) else None


def read_compressed_blocks(
    paths: Sequence[Path], dims: TransformerDims, itemsize: int, *, has_loras: bool
) -> CompressedBlocks | None:
    """Return `count_compressed_blocks` of files, as far as they are here; nothing but headers is read."""
    experts = [_read_tensor_types(path) for path in paths]
    return count_compressed_blocks(experts, dims, itemsize, None if has_loras else 0)


def _read_tensor_types(path: Path) -> TensorTypes:
    try:
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                return {}
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = read_gguf_header(path, data)
    except (OSError, InputError):
        return {}  # what is wrong with the file is said when it is opened
    return {name: (tensor.shape, tensor.type_name) for name, tensor in header.tensors.items()}


def describe_weights(workload: Workload, arrangement: Arrangement, requested: str | None) -> str:
    """Return in words how a GGUF file's weights are kept and why, empty for other files.

    ``requested``: the value of memory.gguf.
    """
    compressed = workload.compressed_blocks
    if compressed is None:
        return ""
    decoded_bytes = count_all_blocks_bytes(
        workload.model_dims.transformer, workload.itemsize, workload.quant
    )
    if requested is not None:
        reason = f"memory.gguf={requested}"
    elif arrangement.gguf == "decoded":
        reason = "there is room"
    elif arrangement.dit == "disk":
        reason = "they are read at each step"
    else:
        reason = "decoded ones have no room"
    if arrangement.gguf == "decoded":
        return f"weights are decoded as they are read ({reason})"
    sizes = f"{compressed.all_bytes / GIB:.1f} GiB instead of {decoded_bytes / GIB:.1f}"
    text = f"weights stay in the file's blocks, {sizes} ({reason})"
    if compressed.num_changed:
        text += (
            f"; LoRAs are merged into {compressed.num_changed} of {compressed.num_weights} "
            "again in each step"
        )
    return text
