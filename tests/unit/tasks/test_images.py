import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from wan_dist.runtime.errors import InputError
from wan_dist.tasks import images
from wan_dist.tasks.images import crop_to_cover, read_image

GRADIENT = np.stack(
    np.broadcast_arrays(np.arange(40)[:, None] * 6, np.arange(60)[None, :] * 4, 128), axis=-1
).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    image = read_image(str(path), "image")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "bmp", "tiff"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GRADIENT).save(tmp_path / f"x.{suffix}", quality=100)
    assert np.abs(read(tmp_path / f"x.{suffix}") - GRADIENT).mean() < (
        0.1 if suffix in ("png", "bmp", "tiff") else 4
    )


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
    """A photo stored in any of the eight orientations is read as it should be seen: the red corner
    at the top left.
    """
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


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "tiff_lzw"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_rotation_in_other_formats(form: str, orientation: int, tmp_path: Path) -> None:
    """Some of Pillow's readers turn the image themselves: it must not be turned twice."""
    upright = Image.new("RGB", (64, 32), "blue")
    upright.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(
        Image.Transpose.ROTATE_90 if orientation == 6 else Image.Transpose.ROTATE_180
    )
    options = (
        {"compression": form}
        if form == "tiff_lzw"
        else {"lossless": True}
        if form == "WEBP"
        else {}
    )
    stored.save(tmp_path / "x", "TIFF" if form == "tiff_lzw" else form, exif=exif, **options)
    assert (read(tmp_path / "x") == np.asarray(upright)).all()


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"],
)
def test_every_mode_of_pillow(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half seen through where a mode has alpha; no file format holds all modes."""
    (tmp_path / "x.png").write_bytes(b"there is a file")
    image = Image.new(
        "RGBA",
        (4, 4),
        (255, 255, 255, 128) if mode in ("La", "LA", "PA", "RGBa", "RGBA") else "white",
    )
    if mode == "LAB":
        image = Image.new("LAB", (4, 4), (255, 128, 128))
    else:
        image = image.convert(
            {"La": "LA", "1": "L", "P": "RGB", "PA": "LA"}.get(
                mode, mode if mode in ("LA", "RGBA", "RGBa") else "RGB"
            )
        )
        image = image.convert(mode)
    monkeypatch.setattr(images, "_open_image", lambda _: image)
    assert (read(tmp_path / "x.png") >= 254).all()


def tiff(bits: int, kind: int, values: bytes, photometric: int = 1, **tags: int) -> bytes:
    """Return a TIFF of two by two pixels of one channel; ``kind``: 1 unsigned, 2 signed, 3 float."""
    known = {
        256: 2,
        257: 2,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: 2,
        279: len(values),
        339: kind,
    }
    known |= {int(tag.strip("_")): value for tag, value in tags.items()}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(known.items())
    )
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(values))
        + values
        + struct.pack("<H", len(known))
        + entries
        + bytes(4)
    )


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (tiff(8, 1, bytes([0, 51, 102, 255])), [0, 51, 102, 255]),
        (tiff(16, 1, struct.pack("<4H", 0, 51 * 257, 102 * 257, 65535)), [0, 51, 102, 255]),
        (
            tiff(16, 1, struct.pack("<4H", 65535, 204 * 257, 153 * 257, 0), photometric=0),
            [0, 51, 102, 255],
        ),
        (tiff(12, 1, bytes([0x00, 0x03, 0x33, 0x66, 0x6F, 0xFF])), [0, 51, 102, 255]),
        (b"P5 2 2 65535\n" + struct.pack(">4H", 0, 51 * 257, 102 * 257, 65535), [0, 51, 102, 255]),
        (b"P5 2 2 255\n" + bytes([0, 51, 102, 255]), [0, 51, 102, 255]),
        (tiff(32, 3, struct.pack("<4f", 0, 0.2, 0.4, 1)), "32-bit floats"),
        (b"Pf 2 2 -1\n" + struct.pack("<4f", 0, 0.2, 0.4, 1), "32-bit floats"),
        (tiff(32, 1, struct.pack("<4I", 0, 51, 102, 2**32 - 1)), "32-bit whole numbers"),
        (tiff(16, 2, struct.pack("<4h", 0, 51, -5, 9)), "signed numbers"),
        (tiff(8, 2, struct.pack("<4b", 0, 51, -5, 9)), "signed numbers"),
        (tiff(64, 3, struct.pack("<4d", 0, 0.2, 0.4, 1)), "TIFF of a kind that is not supported"),
        (tiff(8, 1, bytes(4), _254=1), "a camera's RAW"),
        (tiff(8, 1, bytes(4), _50706=0x01040000), "a camera's RAW"),
    ],
)
def test_bits_are_scaled_or_named(content: bytes, wanted: list[int] | str, tmp_path: Path) -> None:
    (tmp_path / "x.tiff").write_bytes(content)
    if isinstance(wanted, str):
        with pytest.raises(InputError, match=f"cannot be read as an image: .*{wanted}"):
            read(tmp_path / "x.tiff")
    else:
        assert read(tmp_path / "x.tiff")[:, :, 0].ravel().tolist() == wanted


def test_sixteen_bits_with_a_colour_that_is_not_seen(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51 * 257]], np.uint16)).save(tmp_path / "x.png", transparency=0)
    assert read(tmp_path / "x.png")[0, :, 0].tolist() == [255, 51]


P3 = [[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]
SRGB = [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
"""XYZ under D50 of full red, green and blue."""


def profile(primaries: list[list[float]]) -> bytes:
    """Return an ICC profile with the curve of sRGB and these primaries (ICC.1:2010)."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = (
        b"para"
        + bytes(4)
        + struct.pack(">HH", 3, 0)
        + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    )
    name = "Wide".encode("utf-16-be")
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(name), 28) + name
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    for number, channel in enumerate("rgb"):
        tags[f"{channel}XYZ".encode()] = (
            b"XYZ " + bytes(4) + fixed(*(row[number] for row in primaries))
        )
        tags[f"{channel}TRC".encode()] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = (
        bytes(8)
        + struct.pack(">I", 0x04300000)
        + b"mntrRGB XYZ "
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + fixed(0.9642, 1, 0.8249)
    )
    return struct.pack(">I", start + len(body)) + header[4:] + bytes(48) + table + body


def through(colours: np.ndarray, first: list[list[float]], second: list[list[float]]) -> np.ndarray:
    """Convert colours (n, 3) of 0 to 255 from some primaries to others, as the formula of sRGB's
    curve has it.
    """
    encoded = colours / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(second) @ np.array(first)).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_photo_in_display_p3_is_converted(alpha: bool, tmp_path: Path) -> None:
    """Those of iPhones are: read as sRGB, their colours are dull."""
    wanted = np.array(
        [
            [200, 30, 40],
            [30, 160, 60],
            [20, 40, 180],
            [128, 128, 128],
            [255, 255, 255],
            [0, 0, 0],
            [240, 200, 170],
        ]
    )
    stored = through(wanted, SRGB, P3).round().astype(np.uint8)[None]
    assert np.abs(stored[0] - wanted).max() > 10
    pixels = np.dstack([stored, np.full(stored.shape[:2], 255, np.uint8)]) if alpha else stored
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=profile(P3))
    assert np.abs(read(tmp_path / "x.png")[0] - wanted).max() <= 2


@pytest.mark.parametrize(
    "icc",
    [
        profile(SRGB),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"noise",
        b"",
    ],
    ids=["matrix", "lcms", "noise", "none"],
)
def test_plain_srgb_is_read_bit_by_bit(icc: bytes, tmp_path: Path) -> None:
    Image.fromarray(GRADIENT).save(tmp_path / "x.png", icc_profile=icc)
    assert (read(tmp_path / "x.png") == GRADIENT).all()
    grey = GRADIENT[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=icc)
    assert (read(tmp_path / "grey.png")[:, :, 1] == grey).all()


def test_a_profile_of_other_pixels_is_left_aside(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert("CMYK")
    image.save(tmp_path / "x.tiff", icc_profile=profile(P3))
    assert (read(tmp_path / "x.tiff") == np.asarray(image.convert("RGB"))).all()


PLUGIN = """
import io
from PIL import Image, PngImagePlugin

def register_heif_opener():
    Image.register_open(
        "HEIF",
        lambda file, _: PngImagePlugin.PngImageFile(io.BytesIO(file.read()[24:])),
        lambda begin: b"ftyp" in begin,
    )
"""


def test_heic_is_read_where_there_is_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin that is as pillow-heif but for what it reads: a PNG behind the header of HEIC."""
    (tmp_path / "pillow_heif.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.fromarray(GRADIENT).save(tmp_path / "x.png")
    (tmp_path / "x.heic").write_bytes(
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + (tmp_path / "x.png").read_bytes()
    )
    try:
        assert (read(tmp_path / "x.heic") == GRADIENT).all()
    finally:
        sys.modules.pop("pillow_heif", None)


def test_large_photos_are_read_at_a_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of 200 megapixels, with limits that a quick test can meet."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    monkeypatch.setattr(images, "_MAX_PIXELS", 1200)
    monkeypatch.setattr(images, "_SCALED_JPEG_PIXELS", 160)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRADIENT).save(tmp_path / "x.jpg", quality=95, exif=exif)
    assert read(tmp_path / "x.jpg").shape == (15, 10, 3)
    Image.fromarray(GRADIENT).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="it has 0 megapixels, and 0 are accepted; scale it down"):
        read(tmp_path / "x.png")


def test_cover_scales_then_cuts_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("blue", (101, 0, 199, 100))
    cut = np.asarray(crop_to_cover(image, (50, 50)))
    assert cut.shape == (50, 50, 3)
    assert (cut[:, 3:-3] == [0, 0, 255]).all()
    assert crop_to_cover(image, (300, 100)) is image
