"""Digest of weights that any changed tensor changes, without reading all of a large checkpoint."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from wan_dist.weights.files import TensorFiles

_WHOLE_BYTES = 2**26
"""Files of up to this many bytes together are read whole."""
_SMALL_BYTES = 2**16
"""Tensors of up to this many bytes are read whole, too."""
_NUM_PIECES, _PIECE_BYTES = 8, 2**12
"""Sampled of each larger tensor: training and merging change all of it, so a few pieces show the change."""


def hash_weights(tensor_files: Iterable[TensorFiles]) -> str:
    """Return a digest of the tensors' names, dtypes, shapes and values, not of the files' names."""
    digest = hashlib.sha256()
    for files in tensor_files:
        is_small = sum(path.stat().st_size for path in files.paths) <= _WHOLE_BYTES
        for name in sorted(files.stored_names):
            tensor = files.peek(name)
            digest.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()};".encode()
            )
            for piece in _sample_pieces(tensor, is_whole=is_small):
                digest.update(piece.numpy().data)
        digest.update(files.describe_encodings().encode())
        digest.update(b"|")
    return digest.hexdigest()


def _sample_pieces(tensor: Tensor, *, is_whole: bool) -> Iterable[Tensor]:
    """Return a tensor's bytes: all of them, or evenly spaced pieces of a large one."""
    if not tensor.is_contiguous():
        # Its storage, not its values: an expanded tensor may be too large to be made contiguous.
        last_offset = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        tensor = tensor.as_strided((last_offset + 1,), (1,))
    tensor_bytes = tensor.reshape(-1).view(torch.uint8)
    if is_whole or tensor_bytes.numel() <= _SMALL_BYTES:
        return [tensor_bytes]
    # The last piece ends where the tensor does.
    piece_starts = [
        (tensor_bytes.numel() - _PIECE_BYTES) * number // (_NUM_PIECES - 1)
        for number in range(_NUM_PIECES)
    ]
    return [tensor_bytes[start : start + _PIECE_BYTES] for start in piece_starts]
