"""MeanFlow's two steps through the command, on one rank and on several, against two steps written out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import FIXTURES
from tests.ranks.test_runs import Run, run_all
from tests.test_command import reference_arguments
from tests.weight_files import TRANSFORMER_FILE
from wan_dist.config.loras import LoraSetting
from wan_dist.models.transformer import WanTransformer
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.load import fill_model

BASE = FIXTURES / "wan2.1-t2v"
SPREADS = {
    "1": (1, ""),
    "1-streamed": (1, "memory.dit=stream"),
    "2-ulysses": (2, "parallel.ulysses=2"),
    "2-sharded": (2, "parallel.ring=2 fsdp.dit=true"),
}


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("meanflow") / "checkpoint"))
    weights = load_file(folder / TRANSFORMER_FILE)
    torch.manual_seed(3)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        shape = weights[f"time_embedding.{name}"].shape
        weights[f"time_embedding_r.{name}"] = torch.randn(shape) * 0.3
    save_file(weights, folder / TRANSFORMER_FILE)
    return folder


def open_files(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, TASKS["t2v-1.3B"], torch.float32)


def denoise_by_hand(folder: Path, shift: float, *, tells_next: bool = True) -> Tensor:
    """Return the latents after two Euler steps from 1000 and from 500 shifted, by the plain model."""
    component = open_files(folder).transformers[0]
    with torch.device("meta"):
        model = WanTransformer(component.dims, torch.float32)
    fill_model(model, component.files, component.key_map, torch.device("cpu"))
    golden = load_file(BASE / "expected/unipc.safetensors")
    text, latents = golden["input.context"], golden["step0.latent"][None]
    padded = torch.cat([text, torch.zeros(512 - len(text), text.shape[1])])
    projection = open_files(folder).context_projections[0].load(torch.device("cpu"))
    (context,) = projection([padded], None)
    contexts = [context.select_block(index) for index in range(component.dims.num_layers)]
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)
    for sigma, next_sigma in ((1.0, middle), (middle, 0.0)):
        told = torch.tensor([[[1000 * sigma, 1000 * (next_sigma if tells_next else sigma)]]])
        velocity = model(latents, told, contexts, model.compute_rotary(latents))
        latents = latents + (next_sigma - sigma) * velocity
    return latents


def make_settings(folder: Path) -> list[str]:
    return [
        *reference_arguments(BASE, "unipc", "t2v-1.3B", folder),
        *("preset=meanflow-2step", "sample.solver=euler", "sample.steps=2"),
        *("sample.guide_scale=1", "dtype=float32", "cache.dir=null"),
    ]


def read_latents(file: Path) -> Tensor:
    return load_file(file)["latents"][None]


def test_two_steps_tell_the_model_the_next_timestep(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in SPREADS}
    run_all(
        {
            name: Run(
                num_ranks,
                [
                    *make_settings(checkpoint_folder),
                    *spread.split(),
                    f"output.dir={folders[name]}",
                ],
            )
            for name, (num_ranks, spread) in SPREADS.items()
        },
        tmp_path,
    )
    expected = denoise_by_hand(checkpoint_folder, 5.0)
    other = denoise_by_hand(checkpoint_folder, 5.0, tells_next=False)
    assert (other - expected).abs().max() > 1e-2
    for name, folder in folders.items():
        error = (read_latents(folder / "out.latents.safetensors") - expected).abs().max().item()
        print(name, error)
        assert error < 1e-4, name


def test_jobs_with_other_schedules_share_the_model(checkpoint_folder: Path, tmp_path: Path) -> None:
    """Both begin at 1000, and go on to different timesteps."""
    shifts = {"far": 5.0, "near": 2.0}
    lines = [json.dumps({"name": name, "shift": shift}) for name, shift in shifts.items()]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = [
        setting
        for setting in make_settings(checkpoint_folder)
        if not setting.startswith(("output.name=", "sample.shift="))
    ]
    jobs = [f"jobs={tmp_path / 'jobs.jsonl'}", f"output.dir={tmp_path / 'out'}"]
    run_all({"jobs": Run(1, [*settings, *jobs])}, tmp_path)
    for name, shift in shifts.items():
        found = read_latents(tmp_path / f"out/{name}.latents.safetensors")
        expected = denoise_by_hand(checkpoint_folder, shift)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_keys_tell_mean_flow(checkpoint_folder: Path) -> None:
    base, mean_flow = open_files(BASE), open_files(checkpoint_folder)
    assert mean_flow.transformers[0].dims.takes_next_timestep
    assert not base.transformers[0].dims.takes_next_timestep
    assert "takes_next_timestep" not in repr(base.transformers[0].dims)  # the digest is of it
    assert base.digest != mean_flow.digest


def test_loras_may_change_the_second_time_embedding(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    change = torch.full((64,), 0.5)
    save_file({"diffusion_model.time_embedding_r.0.diff_b": change}, tmp_path / "lora.safetensors")
    task, settings = (
        TASKS["t2v-1.3B"],
        [LoraSetting("lora", tmp_path / "lora.safetensors", 1.0, None)],
    )
    changed = open_checkpoint(checkpoint_folder, task, torch.float32, loras=settings)
    biases = [
        checkpoint.transformers[0]
        .load_parts(["time_embedding_r"], torch.device("cpu"))["time_embedding_r"][0]
        .bias
        for checkpoint in (open_files(checkpoint_folder), changed)
    ]
    torch.testing.assert_close(biases[1], biases[0] + change)
