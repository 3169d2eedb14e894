"""Prompts: any text is one; files of them may not be."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.malformed.case import SETTINGS, Case


def _refused(name: str, prompt: str, *says: str) -> Case:
    return Case(name, lambda _: [*SETTINGS, f"prompt={prompt}"], says)


def _in_file(name: str, content: bytes, *says: str) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / "words").write_bytes(content)
        return [*SETTINGS, "prompt=@words"]

    return Case(name, make, ("prompt=@words", *says))


def _no_file(name: str, make: Callable[[Path], None], *says: str) -> Case:
    def made(folder: Path) -> Sequence[str]:
        make(folder / "words")
        return [*SETTINGS, "prompt=@words"]

    return Case(name, made, ("prompt=@words", *says))


def _right(name: str, text: str, stem: str, *, in_file: bool = False) -> Case:
    def make(folder: Path) -> Sequence[str]:
        if in_file:
            (folder / "words").write_text(text, encoding="utf-8")
        return [*SETTINGS, "sample.guide_scale=1", "prompt=@words" if in_file else f"prompt={text}"]

    def check(record: dict[str, object], outputs: Path) -> None:
        assert record["prompt"] == text.lstrip("\ufeff")
        name = record["name"]
        assert re.fullmatch(
            "_".join(part for part in ("toy", re.escape(stem), "42", "[0-9a-f]{6}") if part),
            str(name),
        )
        assert sorted(path.name for path in outputs.glob("[!.]*")) == [
            f"{name}.json",
            f"{name}.latents.safetensors",
            f"{name}.mp4",
        ]

    return Case(name, make, check=check)


CASES = [
    _refused("nothing", "", "prompt is empty"),
    _refused("spaces", " \t ", "prompt is empty"),
    _refused("null", "null", "prompt is missing"),
    _refused(
        "an escape code in a file's name", "@\x1b[31mx", "cannot read \\x1b[31mx", "No such file"
    ),
    _refused(
        "no file",
        "@missing",
        "cannot read missing",
        "No such file",
        "write @@ for a text that begins with @",
    ),
    _refused("no name of a file", "@", "prompt=@", "it is not a file"),
    _refused("a folder", "@.", "prompt=@.", "it is not a file"),
    _refused("a device", "@/dev/zero", "prompt=@/dev/zero", "it is not a file"),
    _refused("nobody's home", "@~nobody-of-this-name/x", "prompt=@~nobody-of-this-name/x"),
    _refused("bytes that are no UTF-8", "caf\udce9", "prompt", "UTF-8"),
    _refused("a name of 5000 letters", "@" + "x" * 5000, "File name too long"),
    _no_file("a pipe", os.mkfifo, "it is not a file"),
    _in_file("an empty file", b"  \n", "the file is empty"),
    _in_file("a picture", b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8"),
    _in_file("UTF-16", "two cats".encode("utf-16"), "not UTF-8"),
    _in_file("UTF-16 without a mark", "two cats".encode("utf-16-le"), "not UTF-8"),
    _in_file("a file of megabytes", b"cat " * 1_000_000, "4000000 bytes"),
    _right(
        "HTML, a shell's commands and escape codes",
        "<b>'&lt;&amp;amp;</b> $(touch ran) `touch ran`; ${oc.env:HOME} "
        "\x1b[31mred\x1b[0m \x07\x1b]0;owned\x07",
        "b-lt-amp-amp-b-touch-ran-touch-ran-oc-en",
    ),
    _right(
        "emoji, right to left, and a NUL",
        "👩‍👧‍👦 🏳️‍🌈 قطتان \u202eexe.tac\u202c חתול two\0cats",
        "قطتان-exe-tac-חתול-two-cats",
    ),
    _right("nothing but signs", "?!…", ""),
    _right(
        "a mark of UTF-8, lines, and 100 kB",
        "\ufefftwo cats\n" + "cat " * 25_000 + "end",
        "two-cats" + "-cat" * 8,
        in_file=True,
    ),
]
