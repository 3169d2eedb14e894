"""Pictures that are none, and some that look wrong and are not."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.malformed.case import Case
from wan_dist.tasks.images import read_image

TASK = ["task=ti2v-5B", "prompt=a cat", "size=64*64", "frame_num=1", "device=cpu", "ckpt_dir=none"]
"""Of a task that takes an image; the image is read before the checkpoint is sought, and there is none."""
TWO = [
    "task=flf2v-14B",
    "prompt=a cat",
    "size=64*64",
    "frame_num=5",
    "device=cpu",
    "ckpt_dir=none",
    "first_frame=first.png",
]

RED = (200, 30, 40)


def saved(
    form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object
) -> bytes:
    """Return a picture, all red, in a form of file."""
    file = io.BytesIO()
    Image.new("RGB", size, RED).convert(mode).save(file, form, **options)
    return file.getvalue()


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG whose header claims a size."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    )
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _refused(name: str, file: str, content: bytes, *says: str) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / file).write_bytes(content)
        return [*TASK, f"image={file}"]

    return Case(name, make, (f"image={file}", *says))


def _place(name: str, make: Callable[[Path], object], *says: str) -> Case:
    def made(folder: Path) -> Sequence[str]:
        make(folder / "x.png")
        return [*TASK, "image=x.png"]

    return Case(name, made, ("image=x.png", *says))


def _given(name: str, value: str, *says: str) -> Case:
    return Case(name, lambda _: [*TASK, f"image={value}"], says)


def _right(
    name: str,
    file: str,
    content: bytes,
    *,
    size: tuple[int, int] = (40, 30),
    colour: tuple[int, ...] = RED,
    within: int = 6,
) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / file).write_bytes(content)
        return [str(folder / file)]

    def check(image: Image.Image, _: Path) -> None:
        assert (image.mode, image.size) == ("RGB", size)
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= within

    return Case(name, make, check=check, read=lambda arguments: read_image(arguments[0], "image"))


def _moving(form: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), colour) for colour in (RED, "blue", "green")]
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return file.getvalue()


def _see_through() -> bytes:
    """A palette whose only colour that is used cannot be seen."""
    image, file = Image.new("P", (40, 30), 0), io.BytesIO()
    image.putpalette([0, 255, 0] * 256)
    image.save(file, "PNG", transparency=0)
    return file.getvalue()


def _sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 51 * 257, np.uint16)).save(file, "PNG")
    return file.getvalue()


def _with_exif(exif: bytes) -> bytes:
    return saved("JPEG", exif=b"Exif\0\0" + exif, quality=95)


_WRONG_TYPE = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 2, 40, 0xFFFFFF0) + b"\0\0\0\0"
"""An orientation that is a text beyond the end of the file."""
_NO_ORIENTATION = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 99, 0) + b"\0\0\0\0"
_PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
_NOT_READ = "cannot be read as an image"
_OTHERS = (
    ("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    ("x.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    ("x.jxl", b"\xff\x0a" + bytes(99), "JPEG XL"),
    ("y.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    ("x.cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "a camera's RAW"),
    ("x.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99), "a camera's RAW"),
    ("x.raf", b"FUJIFILMCCD-RAW 0201" + bytes(99), "a camera's RAW"),
    ("x.psd", b"8BPS\0\1" + bytes(99), "layers"),
    ("x.exr", b"v/1\x01" + bytes(99), "dynamic range"),
    ("x.svg", _SVG, "SVG"),
    ("x.png", _SVG, "SVG"),
    ("y.svg", b'<?xml version="1.0"?>\n<!-- cats -->\n' + _SVG, "SVG"),
    ("y.png", _PROGRAM, "PostScript"),
    ("x.pdf", b"%PDF-1.7\n1 0 obj<<>>endobj\n", "a PDF"),
    ("x.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(99), "a video"),
    ("x.webm", b"\x1aE\xdf\xa3" + bytes(99), "a video"),
    ("z.jpg", b"<!DOCTYPE html><html>404</html>", "a page of HTML"),
    (
        "lfs.jpg",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer",
    ),
)


def _shapes(first: tuple[int, int], last: tuple[int, int], *says: str) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / "first.png").write_bytes(saved("PNG", size=first))
        (folder / "last.png").write_bytes(saved("PNG", size=last))
        return [*TWO, "last_frame=last.png"]

    return Case(f"first of {first}, last of {last}", make, says)


CASES = [
    *(
        _refused(f"a truncated {form}", f"x.{form}", saved(form)[:-length], _NOT_READ)
        for form, length in (("JPEG", 200), ("WebP", 20))
    ),
    _refused("a truncated PNG", "x.png", saved("PNG", size=(400, 300))[:100], _NOT_READ),
    _refused("a header of PNG alone", "x.png", saved("PNG")[:33], _NOT_READ),
    _refused("the mark of PNG alone", "x.png", saved("PNG")[:8], _NOT_READ),
    _refused("a truncated GIF", "x.gif", saved("GIF")[:30], _NOT_READ),
    _refused("a truncated TIFF", "x.tiff", saved("TIFF")[:60], _NOT_READ),
    _refused("a truncated BMP", "x.bmp", saved("BMP")[:100], _NOT_READ),
    _refused("a PNG with a wrong sum", "x.png", saved("PNG").replace(b"IDAT", b"IDAU"), _NOT_READ),
    _refused("a PNG whose data is none", "x.png", _png(40, 30, b"short"), _NOT_READ),
    _refused("a PNG of no width", "x.png", _png(0, 30), _NOT_READ),
    _refused("a text", "x.png", b"two cats\n", _NOT_READ, "JPEG, PNG and WebP"),
    *(
        _refused(f"{what} called {file}", file, content, _NOT_READ, what)
        for file, content, what in _OTHERS
    ),
    _refused("zero bytes", "x.png", b"", _NOT_READ),
    _refused("a thousand zeros", "x.png", bytes(1000), _NOT_READ),
    _refused("a bomb", "x.png", _png(60_000, 60_000), "it has 3600 megapixels", "179 are accepted"),
    _refused("the largest bomb", "x.png", _png(2**31 - 1, 2**31 - 1), "pixels"),
    _refused("half a bomb", "x.png", _png(12_000, 10_000), _NOT_READ),
    _place("a folder", Path.mkdir, "it is not a file"),
    _place("a pipe", os.mkfifo, "it is not a file"),
    _place("nothing", lambda _: None, "there is no such file"),
    _place("a link to nothing", lambda path: path.symlink_to("nothing"), "there is no such file"),
    _place("a link to itself", lambda path: path.symlink_to(path), "symbolic links"),
    _given("/dev/zero", "/dev/zero", "image=/dev/zero", "it is not a file"),
    _given("an empty name", "", "image", "empty"),
    _given("nobody's home", "~nobody-of-this-name/x.png", "image=~nobody-of-this-name/x.png"),
    _given("a long name", "x" * 300, "File name too long"),
    _given("an address", "https://example.com/x.png", "there is no such file"),
    _given("a line's end in its name", "x\n.png", "image=x\\n.png", "there is no such file"),
    _given("an escape code", "\x1b[31mx.png", "image=\\x1b[31mx.png", "there is no such file"),
    _shapes((60, 60), (1, 60_000), "an image of 1x60000 cannot be cut to 60x60"),
    _shapes((1, 20_000), (60, 60), "an image of 60x60 cannot be cut to 1x20000"),
    _shapes((1, 10_000), (1, 10_000), "too small for this image's shape"),
    _shapes((10_000, 1), (10_000, 1), "too small for this image's shape"),
    _right("1 x 1", "x.png", saved("PNG", size=(1, 1)), size=(1, 1)),
    _right("a PNG called JPEG", "x.jpg", saved("PNG")),
    _right("a JPEG called PNG", "x.png", saved("JPEG", quality=95)),
    _right("a WebP called TXT", "x.txt", saved("WebP", lossless=True)),
    _right("a name without a suffix", "-x", saved("PNG")),
    _right("a GIF that moves", "x.gif", _moving("GIF")),
    _right("a WebP that moves", "x.webp", _moving("WebP")),
    _right("a PNG that moves", "x.png", _moving("PNG")),
    _right("a TIFF of several pages", "x.tiff", _moving("TIFF")),
    _right("an AVIF that moves", "x.avif", _moving("AVIF")),
    _right("CMYK", "x.jpg", saved("JPEG", "CMYK", quality=95), within=12),
    _right("YCbCr in TIFF", "x.tiff", saved("TIFF", "YCbCr")),
    _right("16 bits", "x.png", _sixteen_bits(), colour=(51, 51, 51), within=0),
    _right(
        "one bit", "x.png", saved("PNG", "1", size=(1, 1)), size=(1, 1), colour=(0, 0, 0), within=0
    ),
    _right(
        "a palette that cannot be seen", "x.png", _see_through(), colour=(255, 255, 255), within=0
    ),
    _right("EXIF of one byte", "x.jpg", _with_exif(b"I")),
    _right("EXIF of noise", "x.jpg", _with_exif(bytes(range(256)))),
    _right("EXIF that ends early", "x.jpg", _with_exif(b"II*\0\x08\0\0\0\xff\xff")),
    _right("EXIF that points beyond the file", "x.jpg", _with_exif(_WRONG_TYPE)),
    _right("an orientation of 99", "x.jpg", _with_exif(_NO_ORIENTATION)),
    _right("bytes after the end", "x.png", saved("PNG") + b"PK\3\4" + bytes(100)),
]
