"""Images as people have them -> plain 8-bit RGB, and the video sizes that keep their aspect. No torch."""

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableError, check_file
from wan_dist.tasks.colours import PixelError, check_tiff, to_rgb

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
"""Not all that Pillow knows: for PostScript it would run a program. HEIF is a plugin's."""
_MOST_PIXELS = 2 * (2**30 // 12)
"""As Pillow has it."""
_MOST_PIXELS_OF_JPEG = 2**29
"""Decoded at a fraction; a progressive one takes up to 6 bytes a pixel meanwhile."""
_PIXELS_OF_FRACTION = 2**26

_CONVERT = "convert it to JPEG or PNG"
_FOREIGN = (
    (rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "HEIC, as phones write it", f"{_CONVERT}, or install pillow-heif"),
    (rb".{4}ftypavi[fs]", "AVIF, which this Pillow was built without", _CONVERT),
    (rb".{4}ftypcrx|II\*\0.{4}CR|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0", "a camera's RAW", "develop it to JPEG or PNG"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video", "save one frame of it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    (rb"8BPS|gimp xcf", "a file of layers (PSD or XCF)", "export it as PNG"),
    (rb"%PDF", "a PDF", "export a page of it as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", "export it as PNG"),
    (rb"\s*(<\?xml.*)?(<!--.*-->\s*)?<svg", "SVG", "export it as PNG, in the size that it should have"),
    (rb"\s*(?i:<!doctype html|<html)", "a page of HTML, as a failed download leaves", "download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file with `git lfs pull`"),
    (rb"v/1\x01|#\?RADIANCE|II\xbc\x01", "a picture of high dynamic range", "save it with 8 or 16 bits a channel"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF of a kind that is not read, such as floats", "save it with 8 bits a channel"),
)
"""How files begin that are no pictures for us, what they are, and what to do."""


def read_image(file: str, key: str) -> Image.Image:
    """Return the image upright in 8-bit sRGB: EXIF rotation applied, transparency laid on white, 16 bits scaled to 8.

    Of several frames the first. A JPEG too large to be decoded whole is read at a fraction of its size. Raises InputError, naming
    ``key``, if there is no such file, or it is no image, or one whose colours are not certain.
    """
    path = Path(file).expanduser()
    try:
        check_file(path)
    except UnreadableError as fault:
        raise InputError(f"{key}={file}: there is no such file ({fault})") from None
    try:
        image, notes = _read(path)
    except PixelError as fault:
        raise InputError(f"{key}={file} cannot be read as an image: {fault}") from None
    except Exception as fault:  # Pillow's readers raise many types for what is broken
        raise InputError(f"{key}={file} cannot be read as an image{_reason(path, fault)}") from None
    for note in notes:
        _tell_once(f"note      {key}={file}: {note}")
    return image


@cache
def _tell_once(note: str) -> None:
    logger.info("%s", note)


def _reason(path: Path, fault: Exception) -> str:
    """Return why a file is no image, by how it begins, and what to do."""
    if isinstance(fault, UnidentifiedImageError):
        begin = _begin_of(path)
        if found := next(((what, hint) for sign, what, hint in _FOREIGN if re.match(sign, begin, re.DOTALL)), None):
            return f": it is {found[0]}; {found[1]}"
    return f" ({first_line(fault)}); JPEG, PNG and WebP can"


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """Read an image, and what to say of it; an orientation that cannot be read is none."""
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, of which the largest are errors, and of broken EXIF
        with _open(path) as opened:
            check_tiff(opened)
            whole = opened.size
            if whole[0] * whole[1] > _MOST_PIXELS:
                scale = next(scale for scale in (2, 4, 8) if whole[0] * whole[1] <= _PIXELS_OF_FRACTION * scale**2 or scale == 8)
                opened.draft(None, (whole[0] // scale, whole[1] // scale))
                notes.append(f"{_megapixels(whole[0] * whole[1])} megapixels are read at 1/{scale} of their width and height")
            opened.load()
            try:
                image = ImageOps.exif_transpose(opened)
            except Exception:
                image = opened.copy()
            image, profile = to_rgb(image, opened)
            if profile:
                notes.append(f"its colours are converted from {profile} to sRGB")
            if opened.format != "MPO" and _has_frames(opened):
                notes.append("of its frames the first is taken")
    return image, notes


def _open(path: Path) -> Image.Image:
    """Open an image, also a JPEG that is too large to be decoded whole; raises PixelError for others so large."""
    Image.init()
    if re.match(_FOREIGN[0][0], _begin_of(path), re.DOTALL) and importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    try:
        return Image.open(path, formats=[form for form in _FORMATS if form in Image.OPEN])
    except Image.DecompressionBombError as fault:
        if _begin_of(path).startswith(b"\xff\xd8\xff"):
            opened = JpegImagePlugin.JpegImageFile(path)
            if (pixels := opened.width * opened.height) <= _MOST_PIXELS_OF_JPEG:
                return opened
            opened.close()
            most = _MOST_PIXELS_OF_JPEG
        else:
            pixels, most = int(re.findall("[0-9]+", str(fault))[0]), _MOST_PIXELS
        raise PixelError(f"it has {_megapixels(pixels)} megapixels, and {_megapixels(most)} are taken; make it smaller") from None


def _has_frames(opened: Image.Image) -> bool:
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # of later frames that are broken, which are not needed
        return True


def _begin_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def _megapixels(pixels: int) -> int:
    return round(pixels / 1e6)


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
