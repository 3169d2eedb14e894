"""Runs of the command with transformers as few-step models are published."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import golden_folder, relative_error
from tests.forked import run_ranks
from tests.test_command import CHECKPOINT, reference_arguments
from tests.weight_files import TRANSFORMER_FILE
from wan_dist.run import main
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint


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


def write_turbowan(path: Path) -> dict[str, Tensor]:
    """Write a transformer as TurboDiffusion's are, and return its golden."""
    golden = load_file(golden_folder("fewstep") / "turbowan.safetensors")
    weights = load_file(CHECKPOINT / TRANSFORMER_FILE)
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    weights |= {key: value for key, value in golden.items() if ".proj_l." in key}
    save_file(weights, path)
    return golden


def test_sparse_linear_attention_is_turbodiffusions(tmp_path: Path) -> None:
    """A step of their own transformer, whole, and with its queries in slices."""
    golden = write_turbowan(tmp_path / "turbowan.safetensors")
    checkpoint = open_checkpoint(
        CHECKPOINT,
        TASKS["t2v-1.3B"],
        torch.float32,
        given_files={"dit_file": [tmp_path / "turbowan.safetensors"]},
    )
    cpu = torch.device("cpu")
    model = checkpoint.transformers[0].load(cpu)
    model.set_sla_key_share(0.4)
    context = load_file(CHECKPOINT / "expected/unipc.safetensors")["input.context"]
    contexts = checkpoint.context_projections[0].load(cpu)([context])
    latents, timesteps = golden["input.x"].unsqueeze(0), golden["input.t"].view(1, 1)
    for slice_tokens in (None, 128):
        model.set_slice_tokens(slice_tokens)
        (velocity,) = model(latents, timesteps, contexts, model.compute_rotary(latents))
        assert relative_error(velocity[0], golden["output.v"]) < 1e-5


def test_sparse_linear_attention_on_any_ranks(tmp_path: Path) -> None:
    """Alone, streamed, with Ulysses and FSDP: the same video, which is another than the base model's."""
    write_turbowan(tmp_path / "turbowan.safetensors")
    arguments = [
        *reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B"),
        *(f"dit_file={tmp_path / 'turbowan.safetensors'}", "preset=turbowan-4step"),
        *("size=96x64", "frame_num=21", "sla_topk=0.3", "dtype=float32", "device=cpu"),
    ]
    assert main([*arguments, f"output.dir={tmp_path / 'whole'}", "memory.dit=stream"]) == 0
    spread = ["parallel.ulysses=2", "fsdp.dit=true", f"output.dir={tmp_path / 'two'}"]
    run_ranks(2, "wan_dist.run", *arguments, *spread)
    videos = [load_file(f"{folder}/out.safetensors")["video"] for folder in ("whole", "two")]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-3)
    assert json.loads(Path("whole/out.json").read_text(encoding="utf-8"))["attention"] == "sla"
    more = ["sla_topk=1", "output.dir=more"]
    assert main([*arguments, *more]) == 0
    assert relative_error(load_file("more/out.safetensors")["video"], videos[0]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["attention=sdpa"], r"trained with sparse attention \(SLA\): attention=sdpa would"),
        (["memory.slice_tokens=100"], "memory.slice_tokens=100 must be a multiple of 128"),
        (["dit_file=null", "attention=sla"], "attention=sla: .* was not trained with SLA"),
        (["dit_file=null", "sla_topk=0.15"], "sla_topk=0.15: .* was not trained with SLA"),
        (["vsa_sparsity=0.5"], "vsa_sparsity=0.5: .* was not trained with VSA"),
        (["vsa_sparsity=1"], "vsa_sparsity=1.0 must be at least 0 and below 1"),
        (["sla_topk=0"], "sla_topk=0.0 must be above 0"),
    ],
)
def test_what_does_not_suit_sparse_linear_attention(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_turbowan(tmp_path / "turbowan.safetensors")
    arguments = reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B")
    given = [*arguments, f"dit_file={tmp_path / 'turbowan.safetensors'}", *settings]
    assert main([*given, "device=cpu", "dtype=float32"]) == 2
    assert re.search(message, capsys.readouterr().err)


def write_with_gates(path: Path, scale: float) -> None:
    """Write the base model's transformer with random gates, as FastWan's have."""
    weights = load_file(CHECKPOINT / TRANSFORMER_FILE)
    width, generator = weights["blocks.0.ffn.0.weight"].shape[1], torch.Generator().manual_seed(5)
    for index in {key.split(".")[1] for key in weights if key.startswith("blocks.")}:
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            gate = scale * torch.randn(shape, generator=generator)
            weights[f"blocks.{index}.to_gate_compress.{kind}"] = gate
    save_file(weights, path)


def test_video_sparse_attention_on_any_ranks(tmp_path: Path) -> None:
    """With nothing left out and gates of zeros it is the base model; else alike on one and two ranks."""
    for name, scale in (("zero", 0.0), ("gate", 0.3)):
        write_with_gates(tmp_path / f"{name}.safetensors", scale)
    arguments = [
        *reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B"),
        *("dtype=float32", "device=cpu"),
    ]
    zero = [f"dit_file={tmp_path / 'zero.safetensors'}", "vsa_sparsity=0", "output.dir=base"]
    assert main([*arguments, *zero, "memory.slice_tokens=7"]) == 0
    expected = load_file(CHECKPOINT / "expected/unipc.safetensors")["video"]
    found = load_file("base/out.safetensors")["video"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    gated = [f"dit_file={tmp_path / 'gate.safetensors'}", "vsa_sparsity=0.5"]
    gated += ["size=96x64", "frame_num=21"]
    assert main([*arguments, *gated, "output.dir=one", "memory.slice_tokens=50"]) == 0
    spread = ["parallel.ulysses=2", "fsdp.dit=true", f"output.dir={tmp_path / 'two'}"]
    run_ranks(2, "wan_dist.run", *arguments, *gated, *spread)
    videos = [load_file(f"{folder}/out.safetensors")["video"] for folder in ("one", "two")]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-3)
    assert main([*arguments, *gated, "output.dir=all", "vsa_sparsity=0"]) == 0
    assert relative_error(load_file("all/out.safetensors")["video"], videos[0]) > 1e-3
