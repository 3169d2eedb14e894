"""Encoded images are encoded once: the second run reads them, and makes the same video."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import golden_folder
from tests.forked import run_ranks
from tests.test_command import reference_arguments
from wan_dist.run import main


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def read_latents(folder: str) -> torch.Tensor:
    return load_file(Path(folder, "out.latents.safetensors"))["latents"]


def read_stages(folder: str) -> dict[str, object]:
    return json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))["stages"]


def test_an_image_is_encoded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = golden_folder("wan2.1-i2v")
    settings = [
        *reference_arguments(golden, "unipc", "i2v-14B"),
        *("dtype=float32", "device=cpu", f"cache.dir={tmp_path / 'cache'}"),
    ]
    (image,) = [setting for setting in settings if setting.startswith("image=")]
    copied = tmp_path / "copy.png"
    shutil.copy(image.removeprefix("image="), copied)
    others = [setting for setting in settings if setting != image]
    assert main([*settings, "output.dir=first"]) == 0
    assert "image     read from the cache" not in capsys.readouterr().err
    assert {"look", "image"} <= set(read_stages("first"))
    assert main([*others, f"image={copied}", "output.dir=second"]) == 0
    assert "image     read from the cache" in capsys.readouterr().err
    assert not {"look", "image"} & set(read_stages("second"))
    assert torch.equal(read_latents("first"), read_latents("second"))
    pixels = Image.open(copied).convert("RGB")
    pixels.putpixel((0, 0), (1, 2, 3))
    pixels.save(copied)
    assert main([*others, f"image={copied}", "output.dir=third"]) == 0
    assert "image     read from the cache" not in capsys.readouterr().err
    assert not torch.equal(read_latents("first"), read_latents("third"))


def test_all_ranks_know_that_it_was(tmp_path: Path) -> None:
    golden = golden_folder("wan2.1-i2v")
    settings = [
        *reference_arguments(golden, "unipc", "i2v-14B"),
        *("dtype=float32", "device=cpu", f"cache.dir={tmp_path / 'cache'}"),
    ]
    for folder, is_cached in (("first", False), ("second", True)):
        done = run_ranks(2, "wan_dist.run", *settings, f"output.dir={tmp_path / folder}")
        assert ("read from the cache" in "".join(one.stderr for one in done)) == is_cached
    assert torch.equal(
        read_latents(str(tmp_path / "first")), read_latents(str(tmp_path / "second"))
    )
