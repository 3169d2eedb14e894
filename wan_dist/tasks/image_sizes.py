"""Which images a task starts from, and their sizes by their headers: to decode the images of many jobs takes long. No torch."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from wan_dist.config.schema import RunConfig
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import check_file
from wan_dist.tasks.images import covering_size, read_image
from wan_dist.tasks.registry import TASKS, Images, Task

SizeOfImage = Callable[[str, str], tuple[int, int]]
"""From a file and the setting that names it, such as `image_size`, which may be cached."""
_FORMATS = ("JPEG", "PNG", "WEBP")
"""Whose headers and ends say enough; the others are decoded."""
_MOST_PIXELS = 64 * 10**6
"""Larger ones may be read at a fraction of their size."""
_TAIL_BYTES = 4096
"""At the end of a JPEG, where its mark of the end must be: some programs write more after it."""
_TURNED = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange the sides."""


def image_size(file: str, key: str) -> tuple[int, int]:
    """Return (width, height) of what `read_image` returns; raises InputError for what is no image, or an image cut short.

    What is damaged inside is found when the image is decoded. Where the header does not say enough, it is decoded here.
    """
    path = Path(file).expanduser()
    try:
        check_file(path)
        size = _size_in_header(path)
    except Exception:  # Pillow's readers raise many types; what is wrong is said below
        size = None
    return read_image(file, key).size if size is None else size


def image_files(config: RunConfig, task: Task) -> dict[str, str]:
    """Return the files of the images the task starts from, by key; raises InputError if one is missing or not wanted."""
    given = {key: file for key in ("image", "first_frame", "last_frame") if (file := getattr(config, key)) is not None}
    wanted = task.images.keys
    if unwanted := [key for key in given if key not in wanted]:
        takers = [name for name, other in TASKS.items() if unwanted[0] in other.images.keys and other.repository]
        raise InputError(f"{unwanted[0]} is given, but {task.name} takes {task.images.value}; {', '.join(takers)} would take {unwanted[0]}")
    missing = [key for key in wanted if key not in given]
    if missing and task.images is not Images.OPTIONAL:
        raise InputError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {task.name} takes {task.images.value}")
    return given


def image_sizes(files: Mapping[str, str], size_of_image: SizeOfImage) -> list[tuple[int, int]]:
    """Return the sizes of the files, by setting; raises InputError also where the second cannot be cut to the shape of the first."""
    sizes = [size_of_image(file, key) for key, file in files.items()]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        covering_size(sizes[1], sizes[0])
    return sizes


def _size_in_header(path: Path) -> tuple[int, int] | None:
    """Return the size of the upright image, None where only decoding would tell."""
    Image.init()
    with path.open("rb") as opened, Image.open(opened, formats=_FORMATS) as image:
        width, height = image.size
        if width * height > _MOST_PIXELS or not _is_whole(opened, image.format):
            return None
        exif = Image.Image.getexif(image)  # that of PNG decodes the image, as there might be more after the pixels
        is_turned = exif.get(ExifTags.Base.Orientation, 1) in _TURNED
    return (height, width) if is_turned else (width, height)


def _is_whole(opened: BinaryIO, kind: str | None) -> bool:
    """Whether the end of the image is where it should be."""
    if kind == "WEBP":
        return True  # opening it has read all of it
    if kind == "PNG":
        return _ends_after_pixels(opened)
    opened.seek(0, 2)
    opened.seek(max(0, opened.tell() - _TAIL_BYTES))
    return b"\xff\xd9" in opened.read()


def _ends_after_pixels(opened: BinaryIO) -> bool:
    """Whether a PNG's chunks follow each other to the last one, and none after the pixels says how they are to be shown."""
    opened.seek(0, 2)
    end, place, seen = opened.tell(), 8, b""
    while place + 12 <= end:
        opened.seek(place)
        length, kind = struct.unpack(">I4s", opened.read(8))
        if kind == b"IEND":
            return seen == b"IDAT"
        if seen == b"IDAT" and kind != b"IDAT":
            return False
        seen, place = kind, place + 12 + length
    return False
