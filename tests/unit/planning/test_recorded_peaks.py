"""The plan against the GPU peaks that bench/memory.py has recorded on GPUs: every stage of every
arrangement, within 10 %.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.models.text_encoder import clean_prompt
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_estimate import estimate_memory
from wan_dist.planning.plan import make_plan, plan_memory
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.planning.workload import GIB, Arrangement, Workload
from wan_dist.tasks.registry import get_task

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
ROWS = [
    row
    for file in sorted(RESULTS.glob("memory-*.json"))
    for row in json.loads(file.read_text())["rows"]
]


def load_of(row: dict[str, Any], folder: Path) -> Workload:
    """Return what the row's run worked on; its tokens are the bytes of the prompts, as a random
    checkpoint's are.
    """
    task, *settings = row["row"].split()
    width, height = (
        (1280, 720)
        if "size=1280*720" in settings
        else (1280, 704)
        if task == "ti2v-5B"
        else (832, 480)
    )
    image = folder / "image.png"
    Image.new("RGB", (width, height)).save(image)
    settings = [setting.replace("IMAGE", str(image)) for setting in settings]
    settings += [f"image={image}"] if task.startswith("i2v") else []
    config = compose_config(
        prepare_arguments([f"task={task}", "prompt=two cats boxing on a stage", *settings])
    )
    assert config is not None
    hardware = Hardware(139 * GIB, 200 * GIB, "")
    plan = plan_memory(
        make_plan(config, ranks=(row["ranks"], row["ranks"])),
        config,
        hardware,
        get_task(task).model_dims,
        lambda text: min(512, len(clean_prompt(text).encode()) + 1),
    )
    return plan.workload


def arrangement_of(row: dict[str, Any]) -> Arrangement:
    fields = dict(row["arrangement"])
    return Arrangement(**fields | {key: VaeStrategy(**fields[key]) for key in ("vae", "image")})


def test_there_are_enough_arrangements() -> None:
    assert len(ROWS) >= 20
    assert len({row["row"].split()[0] for row in ROWS}) == 3
    assert {row["ranks"] for row in ROWS} >= {1, 2}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['ranks']} {row['row']}")
def test_gpu_peaks_are_what_is_planned(row: dict[str, Any], tmp_path: Path) -> None:
    load, arrangement = load_of(row, tmp_path), arrangement_of(row)
    uses = {use.name: use.gpu_bytes / GIB for use in estimate_memory(load, arrangement)}
    if (
        load.cfg_degree == 2 and "other_ranks" not in row
    ):  # the first rank's peaks alone, and it has the shorter prompt
        shorter = replace(load, text_lengths=load.text_lengths[:1] * 2)
        uses["denoise"] = next(
            use.gpu_bytes / GIB
            for use in estimate_memory(shorter, arrangement)
            if use.name == "denoise"
        )
    for stage, entry in row["memory"].items():
        if stage in row.get("ran_out", ()):
            continue  # its peak is of the next way
        seen = entry["peak_gpu_gib"]
        print(
            f"{row['ranks']} {row['row']}: {stage} planned {uses[stage]:.2f}, "
            f"seen {seen:.2f} GiB ({uses[stage] / seen - 1:+.0%})"
        )
        assert uses[stage] == pytest.approx(seen, rel=0.1)
