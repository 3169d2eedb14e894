"""Few-step models through the command, on one rank and on several, against what their own code made."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES, golden_folder, relative_error
from tests.ranks.test_runs import Run, run_all
from tests.test_command import reference_arguments

SPREADS = {
    "1": (1, ""),
    "1-streamed": (1, "memory.dit=stream"),
    "2-ulysses": (2, "parallel.ulysses=2"),
    "2-sharded": (2, "parallel.ring=2 fsdp.dit=true"),
    "4": (4, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true"),
}


def read_latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "out.latents.safetensors")["latents"]


def test_lightning_gives_the_latents_of_its_own_code(tmp_path: Path) -> None:
    """Two experts, each with its LoRA, two steps of each; the golden differs by 0.97 without the LoRAs."""
    golden = golden_folder("fewstep") / "lightning-a14b"
    base = golden_folder("wan2.2-t2v-a14b")
    described = json.loads((base / "expected/dpmpp.json").read_text(encoding="utf-8"))
    expected = load_file(golden / "expected.safetensors")
    settings = [
        *("task=t2v-A14B", f"ckpt_dir={base}", f"prompt={described['prompt']}"),
        *("size=64x48", "frame_num=5", "seed=46", "dtype=float32", "cache.dir=null"),
        *(
            f"lora_{expert}={golden / f'{expert}_noise_model.safetensors'}"
            for expert in ("high", "low")
        ),
        *("preset=lightning-4step", "output.name=out"),
    ]
    folders = {name: tmp_path / name for name in SPREADS}
    run_all(
        {
            name: Run(num_ranks, [*settings, *spread.split(), f"output.dir={folders[name]}"])
            for name, (num_ranks, spread) in SPREADS.items()
        },
        tmp_path,
    )
    for name, folder in folders.items():
        error = (read_latents(folder) - expected["latent"]).abs().max().item()
        print(name, error)
        assert error < 1e-4, name


def test_noise_between_steps_is_the_same_on_any_ranks(tmp_path: Path) -> None:
    settings = [
        *reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B"),
        *("dtype=float32", "sample.guide_scale=1", "cache.dir=null"),
    ]
    samplers = {
        "lcm": (["sample.solver=lcm", "sample.steps=4"], ("1", "2-ulysses", "4")),
        "rcm": (["preset=rcm-4step"], ("1",)),
        "frames": (["preset=fastwan-3step"], ("1", "2-sharded")),
    }
    runs = {
        f"{name}-{spread}": Run(
            SPREADS[spread][0], [*settings, *sampler, *SPREADS[spread][1].split()]
        )
        for name, (sampler, spreads) in samplers.items()
        for spread in spreads
    }
    for name, run in runs.items():
        run.arguments.append(f"output.dir={tmp_path / name}")
    run_all(runs, tmp_path)
    for name, (_, spreads) in samplers.items():
        alone = read_latents(tmp_path / f"{name}-1")
        for spread in spreads:
            assert relative_error(read_latents(tmp_path / f"{name}-{spread}"), alone) < 1e-4
    assert relative_error(read_latents(tmp_path / "lcm-1"), read_latents(tmp_path / "rcm-1")) > 0.01
