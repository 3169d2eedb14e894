"""Input images: decoding to upright 8-bit RGB, and video sizes that keep their aspect. No torch."""

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file
from wan_dist.tasks.colours import PixelError, check_tiff_tags, convert_to_rgb

_READABLE_FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "AVIF",
    "HEIF",
    "GIF",
    "BMP",
    "TIFF",
    "JPEG2000",
    "PPM",
    "TGA",
    "ICO",
)
"""Not all of Pillow's formats: for PostScript it would run a program. HEIF needs a plugin."""
_MAX_PIXELS = 2 * (2**30 // 12)
"""Pillow's default limit, above which it raises DecompressionBombError."""
_MAX_JPEG_PIXELS = 2**29
"""Decoded at a fraction of the size; a progressive one takes up to 6 bytes a pixel meanwhile."""
_SCALED_JPEG_PIXELS = 2**26
"""Size to which larger JPEGs are reduced, unless 1/8 of the width and height is more."""

_CONVERT_HINT = "convert it to JPEG or PNG"
_FOREIGN_FORMATS = (
    (
        rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)",
        "HEIC, as phones write it",
        f"{_CONVERT_HINT}, or install pillow-heif",
    ),
    (rb".{4}ftypavi[fs]", "AVIF, which this Pillow was built without", _CONVERT_HINT),
    (
        rb".{4}ftypcrx|II\*\0.{4}CR|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0",
        "a camera's RAW",
        "develop it to JPEG or PNG",
    ),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video", "save one frame of it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT_HINT),
    (rb"8BPS|gimp xcf", "a file of layers (PSD or XCF)", "export it as PNG"),
    (rb"%PDF", "a PDF", "export a page of it as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", "export it as PNG"),
    (
        rb"\s*(<\?xml.*)?(<!--.*-->\s*)?<svg",
        "SVG",
        "export it as PNG, in the size that it should have",
    ),
    (
        rb"\s*(?i:<!doctype html|<html)",
        "a page of HTML, as a failed download leaves",
        "download it again",
    ),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file with `git lfs pull`"),
    (
        rb"v/1\x01|#\?RADIANCE|II\xbc\x01",
        "a picture of high dynamic range",
        "save it with 8 or 16 bits a channel",
    ),
    (
        rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
        "TIFF of a kind that is not supported, such as floats",
        "save it with 8 bits a channel",
    ),
)
"""Signatures of files that cannot be read as images, what the files are, and what to do."""


def read_image(file: str, key: str) -> Image.Image:
    """Return an image upright in 8-bit sRGB: EXIF rotation applied, transparency on white, 16 bits to 8.

    Of several frames the first is read. A JPEG too large to be decoded whole is read at a fraction of its
    size. Raises InputError, naming the setting ``key``, if there is no such file, or it is no image, or
    one whose colours are ambiguous.
    """
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
    except UnreadableFileError as error:
        raise InputError(f"{key}={file}: there is no such file ({error})") from None
    try:
        image, notes = _read_rgb(path)
    except PixelError as error:
        raise InputError(f"{key}={file} cannot be read as an image: {error}") from None
    except Exception as error:  # Pillow's readers raise many types for damaged files
        raise InputError(
            f"{key}={file} cannot be read as an image{_explain_unreadable(path, error)}"
        ) from None
    for note in notes:
        _log_once(f"note      {key}={file}: {note}")
    return image


@cache
def _log_once(note: str) -> None:
    logger.info("%s", note)


def _explain_unreadable(path: Path, error: Exception) -> str:
    """Return why a file is no readable image, by its signature, and what to do."""
    if isinstance(error, UnidentifiedImageError):
        beginning = _read_beginning(path)
        for pattern, format_name, hint in _FOREIGN_FORMATS:
            if re.match(pattern, beginning, re.DOTALL):
                return f": it is {format_name}; {hint}"
    return f" ({get_first_line(error)}); JPEG, PNG and WebP can"


def _read_rgb(path: Path) -> tuple[Image.Image, list[str]]:
    """Return an image in RGB and notes to log; an orientation that cannot be read is ignored."""
    notes = []
    with warnings.catch_warnings():
        # Warnings are of large images, of which the largest are errors, and of broken EXIF.
        warnings.simplefilter("ignore")
        with _open_image(path) as source_image:
            check_tiff_tags(source_image)
            full_size = source_image.size
            if full_size[0] * full_size[1] > _MAX_PIXELS:
                scale = next(
                    scale
                    for scale in (2, 4, 8)
                    if full_size[0] * full_size[1] <= _SCALED_JPEG_PIXELS * scale**2 or scale == 8
                )
                source_image.draft(None, (full_size[0] // scale, full_size[1] // scale))
                megapixels = _round_to_megapixels(full_size[0] * full_size[1])
                notes.append(
                    f"{megapixels} megapixels are read at 1/{scale} of their width and height"
                )
            source_image.load()
            try:
                image = ImageOps.exif_transpose(source_image)
            except Exception:
                image = source_image.copy()
            image, profile_name = convert_to_rgb(image, source_image)
            if profile_name:
                notes.append(f"its colours are converted from {profile_name} to sRGB")
            if source_image.format != "MPO" and _has_several_frames(source_image):
                notes.append("its first frame is used")
    return image, notes


def _open_image(path: Path) -> Image.Image:
    """Open an image, or a JPEG too large to be decoded whole; raises PixelError for others so large."""
    Image.init()
    is_heif = re.match(_FOREIGN_FORMATS[0][0], _read_beginning(path), re.DOTALL)
    if is_heif and importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    formats = [format_name for format_name in _READABLE_FORMATS if format_name in Image.OPEN]
    try:
        return Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        if _read_beginning(path).startswith(b"\xff\xd8\xff"):
            jpeg = JpegImagePlugin.JpegImageFile(path)
            if (num_pixels := jpeg.width * jpeg.height) <= _MAX_JPEG_PIXELS:
                return jpeg
            jpeg.close()
            max_pixels = _MAX_JPEG_PIXELS
        else:
            num_pixels, max_pixels = int(re.findall("[0-9]+", str(error))[0]), _MAX_PIXELS
        raise PixelError(
            f"it has {_round_to_megapixels(num_pixels)} megapixels, "
            f"and {_round_to_megapixels(max_pixels)} are accepted; scale it down"
        ) from None


def _has_several_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # later frames are broken, which are not needed
        return True


def _read_beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def _round_to_megapixels(num_pixels: int) -> int:
    return round(num_pixels / 1e6)


def fit_size_to_area(
    width: int, height: int, area: int, multiple: tuple[int, int]
) -> tuple[int, int]:
    """Return (width, height) of about ``area`` pixels in an image's aspect, rounded down to ``multiple``.

    As in the image-to-video tasks of the reference. Raises InputError if a side would be 0.
    """
    aspect = height / width
    sides = ((area / aspect) ** 0.5, (area * aspect) ** 0.5)
    fitted_size = tuple(
        int(side // step) * step for side, step in zip(sides, multiple, strict=True)
    )
    return _check_sides(fitted_size[0], fitted_size[1], area, multiple)


def fit_best_size_to_area(
    width: int, height: int, area: int, multiple: tuple[int, int]
) -> tuple[int, int]:
    """Return (width, height) of at most ``area`` pixels, multiples of ``multiple``, near an image's aspect.

    Of two candidates, width or height rounded down first, the one nearer to the aspect. As in TI2V-5B of the
    reference. Raises InputError if a side would be 0.
    """
    aspect, (step_x, step_y) = width / height, multiple
    ideal_width = (area * aspect) ** 0.5
    width_first = int(ideal_width // step_x) * step_x
    height_first = int(area / ideal_width // step_y) * step_y
    _check_sides(width_first, height_first, area, multiple)
    width_first_size = (width_first, int(area / width_first // step_y) * step_y)
    height_first_size = (int(area / height_first // step_x) * step_x, height_first)

    def compute_distortion(size: tuple[int, int]) -> float:
        return max(aspect * size[1] / size[0], size[0] / size[1] / aspect)

    if compute_distortion(width_first_size) < compute_distortion(height_first_size):
        return width_first_size
    return height_first_size


def crop_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover ``size`` (width, height) and crop its centre; one of that size is unchanged."""
    if image.size == size:
        return image
    image = image.resize(compute_covering_size(image.size, size), Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def compute_covering_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of an image scaled to cover ``size``; raises InputError if far larger."""
    scale = max(size[0] / image_size[0], size[1] / image_size[1])
    width, height = round(image_size[0] * scale), round(image_size[1] * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or 2**30):
        problem = (
            f"an image of {image_size[0]}x{image_size[1]} cannot be cut to {size[0]}x{size[1]}"
        )
        raise InputError(f"{problem}: their shapes are too different")
    return width, height


def _check_sides(width: int, height: int, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    if width == 0 or height == 0:
        raise InputError(
            f"an area of {area} pixels is too small for this image's shape: "
            f"the sides must be multiples of {multiple}"
        )
    return width, height
