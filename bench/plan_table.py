"""Today's plan for the arrangements that bench/memory.py has measured, and for GPUs of several sizes."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from launch.plan import plan_dry_run
from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.models.text_encoder import clean_prompt
from wan_dist.planning.hardware import Hardware, parse_bytes
from wan_dist.planning.memory_estimate import estimate_memory
from wan_dist.planning.plan import make_plan, plan_memory
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.planning.workload import GIB, Arrangement, Workload
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

_GPUS = ("6GB", "8GB", "16GB", "24GB", "48GB")
_TASKS = {
    "t2v-1.3B 832x480": ["task=t2v-1.3B"],
    "ti2v-5B 1280x704": ["task=ti2v-5B"],
    "t2v-14B 832x480": ["task=t2v-14B", "size=832x480"],
    "t2v-14B 1280x720": ["task=t2v-14B", "size=1280x720"],
}
_DIT_WORDS = {"resident": "resident", "stream": "streamed", "disk": "from disk"}


def build_workload(row: dict[str, Any], folder: Path) -> Workload:
    """Return what a row of bench/results/memory-*.json worked on.

    Its tokens are the bytes of the prompts, as a random checkpoint's are. ``folder`` gets its image.
    """
    task, *settings = row["row"].replace("*", "x").split()
    width, height = 832, 480
    if task == "ti2v-5B" or "size=1280x720" in settings:
        width, height = 1280, 704 if task == "ti2v-5B" else 720
    image = folder / "image.png"
    Image.new("RGB", (width, height)).save(image)
    # A driving video is of the size and of one clip, as one that is not there is planned.
    is_dry_run = any(setting.endswith("=DRIVING") for setting in settings)
    settings = [
        setting.replace("IMAGE", str(image))
        for setting in settings
        if not setting.endswith("=DRIVING")
    ]
    settings += [f"image={image}"] if task.startswith("i2v") else []
    config = compose_config(
        prepare_arguments([f"task={task}", "prompt=two cats boxing on a stage", *settings])
    )
    assert config is not None
    plan = plan_memory(
        make_plan(config, ranks=(row["ranks"], row["ranks"]), is_dry_run=is_dry_run),
        Hardware(139 * GIB, 200 * GIB, ""),
        get_task(task).model_dims,
        lambda text: min(512, len(clean_prompt(text).encode()) + 1),
    )
    return plan.workload


def plan_peaks(row: dict[str, Any]) -> dict[str, float]:
    """Return the planned GPU peak of each stage in GiB, of a row's arrangement."""
    with tempfile.TemporaryDirectory() as folder:
        workload = build_workload(row, Path(folder))
    fields = dict(row["arrangement"])
    arrangement = Arrangement(
        **fields | {key: VaeStrategy(**fields[key]) for key in ("vae", "image")}
    )
    peaks = {stage.name: stage.gpu_bytes / GIB for stage in estimate_memory(workload, arrangement)}
    if workload.cfg_degree == 2 and "other_ranks" not in row:
        # the row has the first rank's peaks alone, and that rank has the shorter prompt
        shorter = replace(workload, text_lengths=workload.text_lengths[:1] * 2)
        stages = estimate_memory(shorter, arrangement)
        peaks["denoise"] = next(
            stage.gpu_bytes / GIB for stage in stages if stage.name == "denoise"
        )
    return peaks


def list_gpu_rows() -> Iterator[list[str]]:
    """Yield the titles, then for each GPU what the plan takes for each task, with 64 GB on the host."""
    yield ["GPU", *_TASKS]
    for gpu in _GPUS:
        yield [gpu.replace("GB", " GB"), *(_describe_plan(gpu, task) for task in _TASKS.values())]


def _describe_plan(gpu: str, settings: list[str]) -> str:
    config = read_config(settings)
    assert config is not None
    hardware = Hardware(parse_bytes(gpu, "gpus"), parse_bytes("64GB", "host"), "host")
    plan = plan_dry_run(config, hardware, (1, 1))
    peaks = {stage.name: stage.gpu_bytes / GIB for stage in plan.stage_memories}
    slices = " in slices" if plan.arrangement.slice_tokens else ""
    tiles = plan.arrangement.vae.num_tiles
    decode = f"{peaks['decode']:.1f}" + (f" in {tiles} tiles" if tiles > 1 else "")
    dit = _DIT_WORDS[plan.arrangement.dit]
    return f"{dit}{slices}, {peaks['denoise']:.1f}, {decode}"
