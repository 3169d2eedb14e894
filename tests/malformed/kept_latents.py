"""Files given as kept latents that hold none, or wrong ones."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tests.malformed.case import SETTINGS, Case


def _case(name: str, make: Callable[[Path], object], *says: str) -> Case:
    def made(folder: Path) -> Sequence[str]:
        make(folder / "x.safetensors")
        return [*SETTINGS, "latents=x.safetensors"]

    return Case(name, made, ("latents=x.safetensors", *says))


def _bytes(name: str, content: bytes, *says: str) -> Case:
    return _case(name, lambda path: path.write_bytes(content), *says)


def _tensors(name: str, tensors: dict[str, Tensor], *says: str) -> Case:
    return _bytes(name, save(tensors), *says)


def _shape(*shape: int, says: str) -> Case:
    return _tensors(f"of shape {shape}", {"latents": torch.zeros(shape)}, says)


def _with(value: float) -> dict[str, Tensor]:
    latents = torch.zeros(16, 1, 2, 4)
    latents[3, 0, 1, 2] = value
    return {"latents": latents}


def _named(name: str, file: str, *says: str) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / file).write_bytes(WHOLE)
        return [*SETTINGS, f"latents={file}"]

    return Case(name, make, says)


def _given(value: str, *says: str) -> Case:
    return Case(f"latents={value}"[:40], lambda _: [*SETTINGS, f"latents={value}"], says)


def _right(name: str, tensors: dict[str, Tensor]) -> Case:
    def make(folder: Path) -> Sequence[str]:
        (folder / "kept.latents.safetensors").write_bytes(save(tensors))
        return [*SETTINGS, "latents=kept.latents.safetensors"]

    def check(_: object, outputs: Path) -> None:
        assert sorted(path.name for path in outputs.glob("[!.]*")) == ["kept.json", "kept.mp4"]

    return Case(name, make, check=check)


WHOLE = save(_with(0.5))
_NOT_READ = "cannot be read as saved latents"

CASES = [
    _bytes("nothing", b"", _NOT_READ),
    _bytes("a text", b"two cats, boxing on a stage", _NOT_READ),
    _bytes("a truncated file", WHOLE[:-10], _NOT_READ),
    _bytes("a truncated header", WHOLE[:40], _NOT_READ),
    _bytes("bytes after the end", WHOLE + b"more", _NOT_READ),
    _bytes("a header of 2^60 bytes", (2**60).to_bytes(8, "little") + WHOLE[8:], _NOT_READ),
    _case("a folder", Path.mkdir, "it is not a file"),
    _case("a pipe", os.mkfifo, "it is not a file"),
    _case("no file", lambda _: None, "No such file"),
    _case("a link to itself", lambda path: path.symlink_to(path), "symbolic links"),
    _given("/dev/zero", "latents=/dev/zero", "it is not a file"),
    _given("", "latents is empty"),
    _given("~nobody-of-this-name/x", "latents=~nobody-of-this-name/x"),
    _given("\x1b[31mx", "latents=\\x1b[31mx", "No such file"),
    _tensors(
        "another key",
        {"video": torch.zeros(16, 1, 2, 4)},
        "has no tensor named latents",
        "video",
    ),
    _tensors("no tensors", {}, "has no tensor named latents"),
    _bytes(
        "the progress of a run",
        save(_with(0.5), {"num_done": "3"}),
        "is the saved progress of a run after 3 steps",
    ),
    _bytes("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", _NOT_READ),
    _named(
        "a name of nothing",
        ".latents.safetensors",
        "output.name (from latents)=''",
        "plain file name",
    ),
    _named(
        "a name of 250 bytes",
        f"{'x' * 230}.latents.safetensors",
        "output.name (from latents)=",
        "230 bytes",
    ),
    _shape(16, says="(16,)"),
    _shape(1, 16, 1, 2, 4, says="(1, 16, 1, 2, 4)"),
    _shape(48, 1, 2, 4, says="toy needs (16, T, h, w)"),
    _shape(16, 0, 2, 4, says="(16, 0, 2, 4)"),
    _shape(16, 1, 0, 4, says="(16, 1, 0, 4)"),
    _shape(16, 1, 3, 4, says="(16, 1, 3, 4); h and w must be multiples of 2"),
    _shape(16, 1, 2, 40_000, says="16384 pixels a side"),
    _tensors(
        "whole numbers", {"latents": torch.zeros(16, 1, 2, 4, dtype=torch.int64)}, "I64", "F32"
    ),
    _tensors("truths", {"latents": torch.zeros(16, 1, 2, 4, dtype=torch.bool)}, "BOOL", "F32"),
    _tensors(
        "complex numbers",
        {"latents": torch.zeros(16, 1, 2, 4, dtype=torch.complex64)},
        "C64",
        "F32",
    ),
    _tensors("NaN", _with(float("nan")), "not finite"),
    _tensors("infinity", _with(float("inf")), "not finite"),
    _tensors(
        "NaN in bfloat16", {"latents": _with(float("nan"))["latents"].bfloat16()}, "not finite"
    ),
    _right(
        "bfloat16, beside another tensor",
        {"latents": _with(0.5)["latents"].bfloat16(), "more": torch.zeros(1)},
    ),
]
