"""Runs of the command with transformers as few-step models are published."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_command import CHECKPOINT, reference_arguments
from tests.weight_files import TRANSFORMER_FILE
from wan_dist.run import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("memory", ["auto", "minimal"])
def test_rcm_files_give_the_reference_implementations_video(
    prefix: str, memory: str, tmp_path: Path
) -> None:
    """The weights of the base model, as rCM and TurboDiffusion store them."""
    weights = load_file(CHECKPOINT / TRANSFORMER_FILE)
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    torch.save({f"{prefix}{name}": value for name, value in weights.items()}, "a.pt")
    arguments = reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B")
    assert main([*arguments, "dit_file=a.pt", f"memory={memory}", "dtype=float32"]) == 0
    video = load_file(tmp_path / "outputs/out.safetensors")["video"]
    expected = load_file(CHECKPOINT / "expected/unipc.safetensors")["video"]
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-3)


def test_sparse_linear_attention_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(CHECKPOINT / TRANSFORMER_FILE)
    weights["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"] = torch.zeros(16, 16)
    save_file(weights, "turbowan.safetensors")
    arguments = reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B")
    assert main([*arguments, "dit_file=turbowan.safetensors", "preset=turbowan-4step"]) != 0
    printed = capsys.readouterr().err
    assert "turbowan.safetensors is a transformer that was trained with sparse-linear" in printed
    assert not list((tmp_path / "outputs").glob("*.mp4"))
