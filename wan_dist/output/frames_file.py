"""Frames of a video as a tensor in a safetensors file, written as they arrive."""

import json
import os
from collections.abc import Generator
from math import prod
from pathlib import Path

from torch import Tensor

from wan_dist.output.video_file import SaveError
from wan_dist.runtime.atomic_write import atomic_write

_FLOAT_BYTES = 4
_LENGTH_BYTES = 8
"""Of the number before the header, to which the header is padded too."""


class FramesWriter:
    """Writer of ``video`` (3, F, H, W), float32, of which no more than a chunk is in memory.

    ``path`` appears only when the file is complete. The methods raise SaveError.
    """

    def __init__(self, path: Path, num_frames: int) -> None:
        self._writing = _write_frames(path, num_frames)
        self._has_begun = False

    def write(self, frames: Tensor) -> None:
        """Add frames (n, H, W, 3), at least one."""
        if not self._has_begun:
            next(self._writing)
            self._has_begun = True
        self._writing.send(frames)

    def finish(self) -> None:
        """Complete the file, after all its frames."""
        next(self._writing, None)

    def close(self) -> None:
        """Remove what was written, unless it is finished."""
        self._writing.close()


def _write_frames(path: Path, num_frames: int) -> Generator[None, Tensor | None, None]:
    """Write the frames that are sent to it, until None is; see `FramesWriter`."""
    chunk = yield
    assert chunk is not None
    shape = (3, num_frames, *chunk.shape[1:3])
    header = _build_header(shape)
    frame_bytes = prod(shape[2:]) * _FLOAT_BYTES
    num_written = 0
    try:
        with atomic_write(path) as temporary_file, temporary_file.open("r+b") as file:
            file.write(header)
            file.truncate(len(header) + prod(shape) * _FLOAT_BYTES)
            file.flush()
            while chunk is not None:
                for channel in range(3):
                    values = chunk[..., channel].float().cpu().contiguous().numpy()
                    frame = channel * num_frames + num_written
                    _write_at(
                        file.fileno(), values.data.cast("B"), len(header) + frame * frame_bytes
                    )
                num_written += len(chunk)
                chunk = yield
            if num_written != num_frames:
                raise SaveError(f"cannot write {path}: {num_written} frames came, not {num_frames}")
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from error


def _build_header(shape: tuple[int, ...]) -> bytes:
    """Return what is before the values in a safetensors file with the tensor ``video`` alone."""
    offsets = [0, prod(shape) * _FLOAT_BYTES]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    header = json.dumps({"video": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _write_at(descriptor: int, values: memoryview, offset: int) -> None:
    """Write all values at a position of a file, of which one call may write a part."""
    while values:
        num_written = os.pwrite(descriptor, values, offset)
        values, offset = values[num_written:], offset + num_written
