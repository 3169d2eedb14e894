"""A digest of weights that tells any one changed tensor, without reading all of a large checkpoint."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from wan_dist.weights.files import TensorFiles

_WHOLE_BYTES = 2**26
"""Files of so many bytes together are read whole."""
_SMALL_BYTES = 2**16
"""Tensors of at most so many are, too."""
_NUM_PIECES, _PIECE_BYTES = 8, 2**12
"""Of each larger tensor: training and merging change all of it, so that a few pieces tell."""


def hash_weights(tensor_files: Iterable[TensorFiles]) -> str:
    """Return a digest of the names, types, shapes and values of the tensors in these files, in whatever files they lie."""
    digest = hashlib.sha256()
    for files in tensor_files:
        is_small = sum(path.stat().st_size for path in files.paths) <= _WHOLE_BYTES
        for name in sorted(files.shapes):
            tensor = files.peek(name)
            digest.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()};".encode()
            )
            for piece in _sample_pieces(tensor, is_whole=is_small):
                digest.update(piece.numpy().data)
        digest.update(b"|")
    return digest.hexdigest()


def _sample_pieces(tensor: Tensor, *, is_whole: bool) -> Iterable[Tensor]:
    if (
        not tensor.is_contiguous()
    ):  # as it lies: what repeats its values may be too large to be laid out
        last_offset = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        tensor = tensor.as_strided((last_offset + 1,), (1,))
    tensor_bytes = tensor.reshape(-1).view(torch.uint8)
    if is_whole or tensor_bytes.numel() <= _SMALL_BYTES:
        return [tensor_bytes]
    piece_starts = [
        (tensor_bytes.numel() - _PIECE_BYTES) * number // (_NUM_PIECES - 1)
        for number in range(_NUM_PIECES)
    ]  # the last one ends where it does
    return [tensor_bytes[start : start + _PIECE_BYTES] for start in piece_starts]
