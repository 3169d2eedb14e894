"""Images as people have them -> plain 8-bit RGB, and the video sizes that keep their aspect. No torch."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wan_dist.errors import InputError, first_line
from wan_dist.reading import UnreadableError, check_file

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
"""Not all that Pillow knows: for PostScript it would run a program."""


def read_image(file: str, key: str) -> Image.Image:
    """Return the image upright in 8-bit RGB: EXIF rotation applied, transparency laid on white, 16 bits scaled to 8.

    Raises InputError, naming ``key``, if there is no such file or it is no image.
    """
    path = Path(file).expanduser()
    try:
        check_file(path)
    except UnreadableError as fault:
        raise InputError(f"{key}={file}: there is no such file ({fault})") from None
    try:
        image = _upright(path)
    except Exception as fault:  # Pillow's readers raise many types for what is broken
        raise InputError(f"{key}={file} cannot be read as an image ({first_line(fault)}); JPEG, PNG and WebP can") from None
    if image.mode.startswith("I"):  # 16 bits in one channel, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _upright(path: Path) -> Image.Image:
    """Read an image; an orientation that cannot be read is none."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, of which the largest are errors, and of broken EXIF
        with Image.open(path, formats=[form for form in _FORMATS if form in Image.OPEN]) as opened:
            opened.load()
            try:
                return ImageOps.exif_transpose(opened)
            except Exception:
                return opened.copy()


def size_of_area(width: int, height: int, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of about ``area`` pixels with the aspect of an image, each side cut to a multiple.

    As the image-to-video tasks of the reference do it. Raises InputError if a side would vanish.
    """
    aspect = height / width
    sides = ((area / aspect) ** 0.5, (area * aspect) ** 0.5)
    found = tuple(int(side // step) * step for side, step in zip(sides, multiple, strict=True))
    return _checked(found[0], found[1], area, multiple)


def best_size_of_area(width: int, height: int, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of at most ``area`` pixels, multiples both, whichever of two ways to cut is nearer to the aspect.

    As TI2V-5B of the reference does it. Raises InputError if a side would vanish.
    """
    ratio, (step_x, step_y) = width / height, multiple
    ideal_width = (area * ratio) ** 0.5
    width_first = int(ideal_width // step_x) * step_x
    height_first = int(area / ideal_width // step_y) * step_y
    _checked(width_first, height_first, area, multiple)
    candidates = (
        (width_first, int(area / width_first // step_y) * step_y),
        (int(area / height_first // step_x) * step_x, height_first),
    )

    def distortion(size: tuple[int, int]) -> float:
        return max(ratio * size[1] / size[0], size[0] / size[1] / ratio)

    first, second = candidates
    return first if distortion(first) < distortion(second) else second


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image until it covers ``size`` (width, height), then cut its centre out; an image of that size is unchanged."""
    if image.size == size:
        return image
    image = image.resize(covering_size(image.size, size), Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def covering_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) to which an image is scaled to cover ``size``; raises InputError where that is far larger."""
    scale = max(size[0] / image_size[0], size[1] / image_size[1])
    width, height = round(image_size[0] * scale), round(image_size[1] * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or 2**30):
        shapes = f"an image of {image_size[0]}x{image_size[1]} cannot be cut to {size[0]}x{size[1]}"
        raise InputError(f"{shapes}: their shapes are too different")
    return width, height


def _checked(width: int, height: int, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    if width == 0 or height == 0:
        raise InputError(f"an area of {area} pixels is too small for this image's shape: the sides must be multiples of {multiple}")
    return width, height
