"""Colour conversion from every Pillow mode to 8-bit sRGB: bit depths, alpha, ICC profiles. No torch."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

# Tags of TIFF
_SUBFILE_TYPE_TAG = 254
_BITS_PER_SAMPLE_TAG = 258
_PHOTOMETRIC_TAG = 262
_SAMPLE_FORMAT_TAG = 339
_DNG_VERSION_TAG = 50706

_MODE_BY_COLOUR_SPACE = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of ICC profiles, and the Pillow modes of their pixels."""
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_MAX_SRGB_DIFFERENCE = 2
"""Of 255, between sRGB and a profile that differs from it only by rounding."""


class PixelError(ValueError):
    """Pixels cannot be read as 8-bit colours; the message continues a sentence on the file."""


def convert_to_rgb(image: Image.Image, source_image: Image.Image) -> tuple[Image.Image, str]:
    """Return an image in 8-bit RGB, and the name of the ICC profile it was converted from, or "".

    ``source_image``: the image as it was opened, whose format says what the numbers mean. Transparent
    pixels are blended with white. The profile is ignored if it is sRGB, or does not suit the pixels.
    Raises PixelError.
    """
    is_grey, is_cmyk = image.mode in _GREY_MODES, image.mode == "CMYK"
    image = _convert_to_8_bits(image, source_image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    profile_name, transform, mode = "", None, ""
    if profile := source_image.info.get("icc_profile"):
        profile_name, transform, mode = _build_srgb_transform(bytes(profile))
    if transform is not None and ((mode == "L") <= is_grey) and ((mode == "CMYK") == is_cmyk):
        rgb_image = ImageCms.applyTransform(image.convert(mode), transform)
        assert rgb_image is not None
    else:
        profile_name, rgb_image = "", image.convert("RGB")
    if alpha is None:
        return rgb_image, profile_name
    rgb_image.putalpha(alpha)
    background = Image.new("RGBA", rgb_image.size, "white")
    return Image.alpha_composite(background, rgb_image).convert("RGB"), profile_name


def check_tiff_tags(source_image: Image.Image) -> None:
    """Raise PixelError for a TIFF whose first image is a thumbnail, or whose samples are signed integers."""
    tags: Any = getattr(source_image, "tag_v2", {})
    if _DNG_VERSION_TAG in tags or tags.get(_SUBFILE_TYPE_TAG, 0) & 1:
        raise PixelError(
            "it is a camera's RAW, with a thumbnail before the picture; develop it to JPEG or PNG"
        )
    if 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT_TAG, 1)):
        raise PixelError(
            "it has signed numbers, and no white point is given; "
            "save it with 8 or 16 bits a channel"
        )


def _convert_to_8_bits(image: Image.Image, source_image: Image.Image) -> Image.Image:
    """Return an image in a mode of at most 8 bits a channel; 16 bits, which Pillow would clip, are scaled."""
    tags: Any = getattr(source_image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and tags):
        number_type = "floats" if image.mode == "F" else "whole numbers"
        raise PixelError(
            f"it has 32-bit {number_type}, and no white point is given; "
            "save it with 8 or 16 bits a channel"
        )
    if image.mode in ("La", "RGBa"):  # premultiplied with alpha
        return image.convert("LA" if image.mode == "La" else "RGBA")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)  # of 16 bits in one channel
    greys = values * (255 / (2 ** int(np.max(tags.get(_BITS_PER_SAMPLE_TAG, 16))) - 1))
    greys = 255 - greys if tags.get(_PHOTOMETRIC_TAG) == 0 else greys
    grey_image = Image.fromarray(greys.round().clip(0, 255).astype(np.uint8))
    if isinstance(transparent_value := image.info.get("transparency"), int):
        alpha = np.where(values == transparent_value, 0, 255).astype(np.uint8)
        grey_image.putalpha(Image.fromarray(alpha))
    return grey_image


@lru_cache(maxsize=8)
def _build_srgb_transform(profile_bytes: bytes) -> tuple[str, Any, str]:
    """Return an ICC profile's name, its transform to sRGB, and the mode that this takes.

    The transform is None if it would change nothing, or cannot be built.
    """
    if not features.check("littlecms2"):
        return "", None, ""
    try:
        icc_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        mode = _MODE_BY_COLOUR_SPACE[icc_profile.profile.xcolor_space]
        transform = ImageCms.buildTransform(
            icc_profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        profile_name = ImageCms.getProfileDescription(icc_profile).strip()
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return "", None, ""  # damaged, or of another colour space
    is_identity = mode != "CMYK" and _is_srgb(transform, mode)
    return profile_name or "its own profile", None if is_identity else transform, mode


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether a transform leaves a grid of colours unchanged, except for rounding."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = (
        np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
        if mode == "RGB"
        else levels[None]
    )
    colours = Image.fromarray(grid)
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    difference = np.asarray(converted).astype(int) - np.asarray(colours.convert("RGB"))
    return int(np.abs(difference).max()) <= _MAX_SRGB_DIFFERENCE
