"""Pixels of every Pillow mode -> 8-bit sRGB: bit depths, alpha, ICC profiles. No torch."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SUBFILE, _DNG_VERSION = 262, 258, 339, 254, 50706
"""Tags of TIFF."""
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of ICC profiles, and what pixels they are of."""
_GREYS = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_MOST_DIFFERENCE = 2
"""Of 255, between sRGB and a profile that is the same but for rounding."""


class PixelError(ValueError):
    """Why pixels cannot be read as 8-bit colours, in words that follow the name of a file."""


def to_rgb(image: Image.Image, source: Image.Image) -> tuple[Image.Image, str]:
    """Return an image in 8-bit RGB, and the name of the ICC profile that its colours were converted from, or "".

    ``source``: the image as it was opened, whose format says what the numbers mean. Transparency is laid on white. Pixels of a profile
    that is sRGB, or that does not suit the pixels, are left as they are. Raises PixelError.
    """
    is_grey, is_cmyk = image.mode in _GREYS, image.mode == "CMYK"
    image = _to_8_bits(image, source)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    name, transform, mode = "", None, ""
    if profile := source.info.get("icc_profile"):
        name, transform, mode = _transform(bytes(profile))
    if transform is not None and ((mode == "L") <= is_grey) and ((mode == "CMYK") == is_cmyk):
        rgb = ImageCms.applyTransform(image.convert(mode), transform)
        assert rgb is not None
    else:
        name, rgb = "", image.convert("RGB")
    if alpha is None:
        return rgb, name
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB"), name


def check_tiff(source: Image.Image) -> None:
    """Raise PixelError for a TIFF whose first image is not the picture, or whose numbers have signs."""
    tags: Any = getattr(source, "tag_v2", {})
    if _DNG_VERSION in tags or tags.get(_SUBFILE, 0) & 1:
        raise PixelError("it is a camera's RAW, with a thumbnail before the picture; develop it to JPEG or PNG")
    if 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise PixelError("it holds numbers with signs, of which none is said to be white; save it with 8 or 16 bits a channel")


def _to_8_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Return an image of a mode of 8 bits or fewer a channel; what Pillow would clip is scaled."""
    tags: Any = getattr(source, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and tags):
        kind = "floats" if image.mode == "F" else "whole numbers"
        raise PixelError(f"it holds 32-bit {kind}, of which none is said to be white; save it with 8 or 16 bits a channel")
    if image.mode in ("La", "RGBa"):  # colours that are multiplied with alpha
        return image.convert("LA" if image.mode == "La" else "RGBA")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)  # of 16 bits in one channel
    greys = values * (255 / (2 ** int(np.max(tags.get(_BITS, 16))) - 1))
    greys = 255 - greys if tags.get(_PHOTOMETRIC) == 0 else greys
    found = Image.fromarray(greys.round().clip(0, 255).astype(np.uint8))
    if isinstance(unseen := image.info.get("transparency"), int):
        found.putalpha(Image.fromarray(np.where(values == unseen, 0, 255).astype(np.uint8)))
    return found


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, Any, str]:
    """Return a profile's name, what converts its colours to sRGB, and from which mode; None where that changes nothing or cannot be."""
    if not features.check("littlecms2"):
        return "", None, ""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space]
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        name = ImageCms.getProfileDescription(opened).strip()
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):  # damaged, or of another space
        return "", None, ""
    return name or "its own profile", None if mode != "CMYK" and _is_srgb(transform, mode) else transform, mode


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether a transform leaves a grid of colours as they are."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3) if mode == "RGB" else levels[None]
    colours = Image.fromarray(grid)
    found = ImageCms.applyTransform(colours, transform)
    assert found is not None
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(colours.convert("RGB"))).max()) <= _MOST_DIFFERENCE
