"""Input images of a task and their sizes, read from the headers. No torch.

Headers, because decoding the images of many jobs takes long.
"""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from wan_dist.runtime.text_files import check_regular_file
from wan_dist.tasks.base import Task
from wan_dist.tasks.images import read_image
from wan_dist.tasks.input_files import check_input_files

ImageSizeReader = Callable[[str, str], tuple[int, int]]
"""(file, setting that names it) -> (width, height): `read_image_size`, or the same with a cache."""
_HEADER_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that headers and ends of files suffice for; others are decoded."""
_MAX_HEADER_PIXELS = 64 * 10**6
"""Larger images may be read at a fraction of their size, so they are decoded."""
_TAIL_BYTES = 4096
"""Bytes at the end of a JPEG in which its end marker must be: some programs write more after it."""
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange width and height."""


def read_image_size(file: str, key: str) -> tuple[int, int]:
    """Return (width, height) of what `read_image` returns; raises InputError for no image or a truncated one.

    Damage inside is found only when the image is decoded. Where the header does not say enough, it is
    decoded here.
    """
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
        size = _read_header_size(path)
    except Exception:  # Pillow's readers raise many types; what is wrong is said below
        size = None
    return read_image(file, key).size if size is None else size


def read_image_sizes(
    input_files: Mapping[str, str], task: Task, image_size_reader: ImageSizeReader
) -> list[tuple[int, int]]:
    """Return the sizes of the task's input images; raises InputError where they do not fit together."""
    check_input_files(input_files, task)
    sizes = [image_size_reader(file, key) for key, file in input_files.items()]
    task.inputs.check_image_sizes(sizes)
    return sizes


def _read_header_size(path: Path) -> tuple[int, int] | None:
    """Return the size of the upright image, None if the header does not say it or the file is truncated."""
    Image.init()
    with path.open("rb") as stream, Image.open(stream, formats=_HEADER_FORMATS) as image:
        width, height = image.size
        if width * height > _MAX_HEADER_PIXELS or not _is_complete(stream, image.format):
            return None
        # PngImageFile.getexif would decode the image, as there might be EXIF after the pixels.
        exif = Image.Image.getexif(image)
        is_transposed = exif.get(ExifTags.Base.Orientation, 1) in _TRANSPOSING_ORIENTATIONS
    return (height, width) if is_transposed else (width, height)


def _is_complete(stream: BinaryIO, format_name: str | None) -> bool:
    """Whether the file is not truncated."""
    if format_name == "WEBP":
        return True  # opening it has read all of it
    if format_name == "PNG":
        return _has_complete_chunks(stream)
    stream.seek(0, 2)
    stream.seek(max(0, stream.tell() - _TAIL_BYTES))
    return b"\xff\xd9" in stream.read()


def _has_complete_chunks(stream: BinaryIO) -> bool:
    """Whether a PNG's chunks lead to its end chunk, right after the pixels: others there could rotate it."""
    stream.seek(0, 2)
    end, offset, last_chunk_type = stream.tell(), 8, b""
    while offset + 12 <= end:
        stream.seek(offset)
        length, chunk_type = struct.unpack(">I4s", stream.read(8))
        if chunk_type == b"IEND":
            return last_chunk_type == b"IDAT"
        if last_chunk_type == b"IDAT" and chunk_type != b"IDAT":
            return False
        last_chunk_type, offset = chunk_type, offset + 12 + length
    return False
