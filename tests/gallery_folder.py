"""Folders of records and videos, as a batch leaves them, for the tests of the gallery."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from toy.render import render
from toy.scenes import draw_scene
from wan_dist.output.gallery.page import write_page
from wan_dist.output.video_file import convert_to_uint8, save_video
from wan_dist.runtime.file_hash import hash_file

BEGAN = 1_795_000_000.0
RUN = "20261122-101500-ab12"


def config(**changes: Any) -> dict[str, Any]:
    """Return settings as a record has them; ``sample__steps=4`` changes sample.steps."""
    settings: dict[str, Any] = {
        **{
            "task": "toy",
            "ckpt_dir": None,
            "prompt": "a red ball",
            "negative_prompt": "blurry",
            "size": "64*64",
            "frame_num": 9,
            "fps": 8,
        },
        **{
            "seed": 42,
            "noise_device": "cpu",
            "dtype": "float32",
            "quant": "none",
            "attention": "auto",
        },
        "cache": {"dir": "auto", "steps": None, "threshold": None},
        "sample": {"solver": "unipc", "steps": 12, "shift": 5.0, "guide_scale": 5.0},
        "output": {"dir": "outputs", "name": None},
    }
    for key, value in changes.items():
        place = settings
        *sections, leaf = key.split("__")
        for section in sections:
            place = place[section]
        place[leaf] = value
    return settings


def write_record(
    folder: Path, name: str, *, facts: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write NAME.json, with further or other entries from ``facts``; a fact of None is left out."""
    settings = config(**changes)
    record = {
        **{
            "config": settings,
            "name": name,
            "status": "done",
            "run": RUN,
            "job": {"file": "jobs.txt", "line": 1},
            "file": f"/far/{name}.mp4",
        },
        **{
            "seed": settings["seed"],
            "prompt": settings["prompt"],
            "width": 64,
            "height": 64,
            "num_frames": 9,
            "fps": 8,
        },
        **{
            "began": BEGAN,
            "seconds": 12.5,
            "step_seconds": 0.5,
            "tflops": 100.0,
            "peak_gpu_gib": 3.4,
            "peak_host_gib": 1.0,
        },
        **{
            "distance": [],
            "digest": "d1",
            "video_digest": "v1",
            "machine": "node-1",
            "versions": {"torch": "2.13.0"},
        },
        "stages": {
            "denoise": {"seconds": 6.0, "host_gib": 1.0, "peak_gpu_gib": 3.4, "began": BEGAN}
        },
        "other_ranks": [{"denoise": {"seconds": 6.1}}],
        "memory": {"denoise": {"planned_gpu_gib": 3.5, "peak_gpu_gib": 3.4}},
    } | (facts or {})
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({key: value for key, value in record.items() if value is not None}),
        encoding="utf-8",
    )
    return path


def describe_source(file: Path, setting: str = "src_video") -> dict[str, str]:
    """Return the entry of a record for a source video."""
    return {"setting": setting, "file": str(file), "sha256": hash_file(file)}


def check_source(folder: Path, settings: list[str]) -> None:
    """Check that the record of a run, and the page, have the source video that the settings name, if any."""
    entry = json.loads((folder / "out.json").read_text(encoding="utf-8")).get("source")
    files = dict(setting.split("=", 1) for setting in settings)
    if "src_root_path" in files:
        files["src_pose"] = f"{files['src_root_path']}/src_pose.mp4"
    given = next((key for key in ("src_pose", "src_video") if key in files), None)
    assert entry == (given and describe_source(Path(files[given]), given))
    page = write_page(folder).read_text(encoding="utf-8")
    assert (f'"url":"./sources/{entry["sha256"][:16]}.mp4"' if entry else '"source":null') in page


def write_run(folder: Path, *, jobs: int = 3, ranks: int = 2, **facts: Any) -> Path:
    """Write runs/RUN.json with two stages for each job and rank."""
    spans = [
        {
            "rank": rank,
            "stage": stage,
            "job": f"job-{job}",
            "began": BEGAN + 10 * job + after,
            "seconds": seconds,
            "gpu_gib": gib,
            "host_gib": 1.0,
        }
        for job in range(jobs)
        for rank in range(ranks)
        for stage, after, seconds, gib in (("load", 0.0, 2.0, 3.0), ("denoise", 2.0, 7.5, 3.4))
    ]
    record = {
        **{
            "run": RUN,
            "began": BEGAN,
            "ended": BEGAN + 10 * jobs,
            "command": ["python", "-m", "launch", "batch"],
            "ranks": ranks,
            "jobs": jobs,
        },
        **{
            "done": jobs,
            "failed": 0,
            "spans": spans,
            "plan": {"denoise": {"seconds": 7.0, "gpu_gib": 3.6, "host_gib": 1.1}},
        },
        "budget": {"gpu_gib": 4.0, "host_gib": 64.0},
    } | facts
    (folder / "runs").mkdir(exist_ok=True)
    path = folder / "runs" / f"{RUN}.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def write_video(
    path: Path, *, num_frames: int = 9, fps: int = 8, size: int = 64, seed: int = 0
) -> Path:
    """Write an mp4 of a shape that moves."""
    chance = random.Random(seed)
    (frames,) = render(
        [draw_scene(chance)], chance, torch.device("cpu"), size=size, num_frames=num_frames
    )
    save_video(
        path,
        [convert_to_uint8(frames.permute(1, 2, 3, 0).contiguous())],
        fps=fps,
        num_frames=num_frames,
    )
    return path
