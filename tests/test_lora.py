"""Runs with LoRAs through the command: what is made, recorded, made again, and told."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, SHARED_GOLDENS, golden_folder
from tests.test_command import reference_arguments
from tests.unit.weights.test_lora import read_weights
from tests.unit.weights.test_lora_merging import make_lora
from wan_dist.config.loras import LoraSetting
from wan_dist.run import main
from wan_dist.runtime.file_hash import hash_file
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read_record(folder: str, name: str = "out") -> dict[str, Any]:
    found = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def read_video(folder: str, name: str = "out") -> torch.Tensor:
    return load_file(Path(folder, f"{name}.safetensors"))["video"]


T2V = [*reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B"), "dtype=float32"]


def test_a_lora_is_recorded_and_its_video_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lora = Path("style.safetensors")
    save_file(make_lora(1)[0], lora)
    with_lora = [f"lora={lora}", "lora_strength=0.5"]
    assert main([*T2V, "output.dir=plain"]) == main([*T2V, *with_lora, "output.dir=styled"]) == 0
    plain, styled = read_record("plain"), read_record("styled")
    assert "loras" not in plain
    assert styled["loras"] == [
        {
            "file": "style.safetensors",
            "bytes": lora.stat().st_size,
            "sha256": hash_file(lora),
            "strength": 0.5,
            "expert": None,
        }
    ]
    told = capsys.readouterr().err
    assert (
        "lora      style.safetensors: DoRA of LoRA and LoHa and LoKr and LoRA and differences"
        in told
    )
    assert "strength 0.5" in told
    save_file(make_lora(2)[0], lora)  # another content under the same name
    assert main([*T2V, *with_lora, "output.dir=other"]) == 0
    digests = [
        (record["digest"], record["latents_digest"])
        for record in (plain, styled, read_record("other"))
    ]
    assert len({digest for pair in digests for digest in pair}) == 6
    videos = [read_video(folder) for folder in ("plain", "styled", "other")]
    distances = [(videos[i] - videos[j]).abs().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 0.02


def test_what_is_wrong_with_a_lora_is_said_before_weights_are_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*T2V, "lora=gone.safetensors"]) == 2
    assert "lora=gone.safetensors cannot be read: No such file" in capsys.readouterr().err
    assert not list(Path("outputs").glob("*.mp4"))


def test_jobs_with_loras_are_the_single_runs(tmp_path: Path) -> None:
    """Each job has its own strength, and none the weights of the one before."""
    (tmp_path / "styles").mkdir()
    save_file(make_lora(1)[0], tmp_path / "styles/a.safetensors")
    strengths = {"half": 0.5, "none": None, "back": -0.5, "half-again": 0.5}
    jobs = [
        {"name": name}
        | ({} if strength is None else {"lora": "a.safetensors", "lora_strength": strength})
        for name, strength in strengths.items()
    ]
    Path("styles/jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    shared = [argument for argument in T2V if not argument.startswith("output.name")]
    prompt = next(argument for argument in T2V if argument.startswith("prompt="))
    assert main([*shared, prompt, "jobs=styles/jobs.jsonl", "output.dir=jobs"]) == 0
    for name, strength in strengths.items():
        own = [] if strength is None else ["lora=styles/a.safetensors", f"lora_strength={strength}"]
        assert main([*T2V, *own, f"output.dir=single-{name}"]) == 0
        assert torch.equal(read_video("jobs", name), read_video(f"single-{name}")), name
        assert ("loras" in read_record("jobs", name)) == (strength is not None)
    modified = {file.name: file.stat().st_mtime_ns for file in Path("jobs").glob("*.mp4")}
    assert main([*shared, prompt, "jobs=styles/jobs.jsonl", "output.dir=jobs"]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in Path("jobs").glob("*.mp4")} == modified


def test_each_expert_has_its_lora(capsys: pytest.CaptureFixture[str]) -> None:
    folder, files = golden_folder("wan2.2-t2v-a14b"), SHARED_GOLDENS / "files/lora"
    if not files.exists():
        pytest.skip("the goldens of LoRA files are not beside this checkout")
    high, low = files / "a14b-high.safetensors", files / "a14b-low.safetensors"
    arguments = [*reference_arguments(folder, "unipc", "t2v-A14B"), "dtype=float32"]
    settings = [
        LoraSetting("lora_high", high, 1.5, "high"),
        LoraSetting("lora_low", low, 0.5, "low"),
    ]
    checkpoint = open_checkpoint(folder, TASKS["t2v-A14B"], torch.float32, loras=settings)
    for index, name in enumerate(("high", "low")):
        weights = {
            key: value.contiguous() for key, value in read_weights(checkpoint, index).items()
        }
        save_file(weights, f"{name}.safetensors")
    assert main([*arguments, "dit_file=high.safetensors,low.safetensors", "output.dir=merged"]) == 0
    own = [
        f"lora_high={high}",
        "lora_high_strength=1.5",
        f"lora_low={low}",
        "lora_low_strength=0.5",
    ]
    assert main([*arguments, *own, "output.dir=pair"]) == 0
    torch.testing.assert_close(read_video("pair"), read_video("merged"), rtol=0, atol=1e-5)
    assert [
        (Path(lora["file"]).name, lora["strength"], lora["expert"])
        for lora in read_record("pair")["loras"]
    ] == [("a14b-high.safetensors", 1.5, "high"), ("a14b-low.safetensors", 0.5, "low")]
    told = capsys.readouterr().err
    assert "strength 1.5, for high noise" in told
    assert "its name says" not in told
    assert main([*arguments, f"lora={high}", "output.dir=both"]) == 0
    told = capsys.readouterr().err
    assert "its name says high noise, and it is used for high and low noise" in told
