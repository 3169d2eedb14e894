from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_dist.images import cover, read_image

GRADIENT = np.stack(np.broadcast_arrays(np.arange(40)[:, None] * 6, np.arange(60)[None, :] * 4, 128), axis=-1).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    image = read_image(str(path), "image")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "bmp", "tiff"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GRADIENT).save(tmp_path / f"x.{suffix}", quality=100)
    assert np.abs(read(tmp_path / f"x.{suffix}") - GRADIENT).mean() < (0.1 if suffix in ("png", "bmp", "tiff") else 4)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([GRADIENT, np.full(GRADIENT.shape[:2], 255, np.uint8)])
    rgba[:20, :, 3] = 0
    rgba[:, :, 0][rgba[:, :, 3] == 0] = 77  # colours under full transparency must not show
    Image.fromarray(rgba).save(tmp_path / "x.png")
    found = read(tmp_path / "x.png")
    assert (found[:20] == 255).all()
    assert (found[20:] == GRADIENT[20:]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1"])
def test_modes(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    assert np.abs(read(path) - np.asarray(image.convert("RGB")).astype(int)).max() <= 1


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    found = read(tmp_path / "x.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[4, 4].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.abs(read(tmp_path / "x.png")[:, :, 1] - values / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int, tmp_path: Path) -> None:
    """A photo stored in any of the eight orientations is read as it should be seen: the red corner at the top left."""
    upright = Image.new("RGB", (64, 32), "blue")
    upright.paste("red", (0, 0, 16, 16))
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for step in undo:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = read(tmp_path / "x.jpg")
    assert found.shape == (32, 64, 3)
    assert found[8, 8, 0] > 200 > found[8, 8, 2]
    assert found[24, 48, 2] > 200


def test_cover_scales_then_cuts_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("blue", (101, 0, 199, 100))
    cut = np.asarray(cover(image, (50, 50)))
    assert cut.shape == (50, 50, 3)
    assert (cut[:, 3:-3] == [0, 0, 255]).all()
    assert cover(image, (300, 100)) is image
