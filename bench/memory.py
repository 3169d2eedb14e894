"""Compare planned with measured memory over arrangements, in whole runs with full-size random checkpoints, and time their steps.

    python bench/checkpoint.py --task t2v-1.3B CHECKPOINTS/t2v-1.3B
    python bench/checkpoint.py --task i2v-14B CHECKPOINTS/i2v-14B --text-encoder-of CHECKPOINTS/t2v-1.3B
    python bench/memory.py CHECKPOINTS
    torchrun --nproc_per_node=4 bench/memory.py CHECKPOINTS --only ranks --rows 0        # several ranks: a row at a time

Each row is a run of its own in this process. Prints planned and measured GPU and host peaks (GiB) of each stage, with the difference, and
seconds a step; writes bench/results/memory-NAME.json.
"""

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from wan_dist.run import main as run
from wan_dist.sampling.denoise import Velocities


@dataclass(frozen=True)
class Row:
    """One run: the group it belongs to, its task and its settings."""

    group: str
    task: str
    settings: str = ""
    num_steps: int = 1

    @property
    def name(self) -> str:
        """The row in a line."""
        return f"{self.task} {self.settings}".strip()


ROWS = (
    Row("1.3B", "t2v-1.3B"),
    Row("1.3B", "t2v-1.3B", "memory.t5=stream memory.dit=stream memory.slice_tokens=2048 memory.passes=apart"),
    Row("1.3B", "t2v-1.3B", "size=480*480 frame_num=33 memory.dit=stream memory.budget_gib=6"),
    Row("1.3B", "t2v-1.3B", "memory.vae=tiled memory.slice_tokens=8192"),
    Row("1.3B", "t2v-1.3B", "memory.dit=disk memory.t5=stream quant=none frame_num=41"),
    Row("1.3B", "t2v-1.3B", "quant=int8 memory.vae=whole frame_num=121"),
    Row("5B", "ti2v-5B", "frame_num=121"),
    Row("5B", "ti2v-5B", "frame_num=121 memory.budget_gib=7.2", 2),
    Row("5B", "ti2v-5B", "frame_num=121 memory.budget_gib=5.2", 2),
    Row("5B", "ti2v-5B", "frame_num=121 quant=fp8"),
    Row("5B", "ti2v-5B", "frame_num=121 memory=low image=IMAGE"),
    Row("14B", "i2v-14B", "size=832*480", 2),
    Row("14B", "i2v-14B", "size=832*480 memory.dit=stream", 2),
    Row("14B", "i2v-14B", "size=832*480 memory=low", 2),
    Row("14B", "i2v-14B", "size=832*480 memory=minimal memory.budget_gib=3.4", 2),
    Row("14B", "i2v-14B", "size=832*480 quant=fp8", 2),
    Row("14B", "i2v-14B", "size=832*480 quant=int8", 2),
    Row("14B", "i2v-14B", "size=832*480 quant=int4", 2),
    Row("14B", "i2v-14B", "size=832*480 quant=int4 memory.dit=stream", 2),
    Row("14B", "i2v-14B", "size=832*480 memory.budget_gib=22", 2),
    Row("14B", "i2v-14B", "size=1280*720 memory.slice_tokens=8192"),
    Row("ranks", "i2v-14B", "size=832*480", 2),
    Row("ranks", "i2v-14B", "size=832*480 parallel.cfg=1 fsdp.dit=false", 2),
    Row("ranks", "i2v-14B", "size=832*480 memory.dit=stream", 2),
    Row("ranks", "i2v-14B", "size=832*480 quant=fp8", 2),
    Row("ranks", "t2v-1.3B", ""),
)


@contextlib.contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Collect the seconds of each forward pass of the transformer, of both branches of guidance."""
    seconds: list[float] = []
    call = Velocities.__call__

    def timed(self: Velocities, latents: torch.Tensor, timestep: int) -> list[torch.Tensor]:
        _wait()
        start = time.perf_counter()
        found = call(self, latents, timestep)
        _wait()
        seconds.append(round(time.perf_counter() - start, 3))
        return found

    Velocities.__call__ = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Velocities.__call__ = call  # type: ignore[method-assign]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(row: Row, checkpoints: Path, out: Path, extra: list[str]) -> dict[str, object]:
    """Run a row; returns its record's comparison and its steps' seconds."""
    width, height = re.findall(r"size=(\d+)\*(\d+)", row.settings)[-1] if "size=" in row.settings else (1280, 704)
    image = out / f"{width}x{height}.png"
    Image.effect_noise((int(width), int(height)), 80).convert("RGB").save(image)
    settings = [
        f"task={row.task}",
        f"ckpt_dir={checkpoints / row.task}",
        "prompt=two cats boxing on a stage",
        f"sample.steps={row.num_steps}",
    ]
    settings += [f"image={image}"] if row.task.startswith("i2v") else []
    settings += [setting.replace("IMAGE", str(image)) for setting in row.settings.split()]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    with timed_steps() as seconds:
        code = run([*settings, "cache.dir=null", f"output.dir={out}", "output.name=row", "output.save_latents=false", *extra])
    found: dict[str, object] = {"row": row.name, "ranks": int(os.environ.get("WORLD_SIZE", "1")), "code": code}
    if code == 0 and os.environ.get("RANK", "0") == "0":
        record = json.loads((out / "row.json").read_text())
        found |= {"arrangement": record["arrangement"], "attention": record["attention"], "seconds": seconds}
        found |= {"stages": {name: stage["seconds"] for name, stage in record["stages"].items()}, "memory": record["memory"]}
    return found


def describe(found: dict[str, object]) -> str:
    """Return a row's table."""
    memory = found.get("memory")
    lines = [f"{found['row']}: code {found['code']}, steps {found.get('seconds')}"]
    for stage, entry in memory.items() if isinstance(memory, dict) else ():
        columns = []
        for kind, key in (("gpu", "peak_gpu_gib"), ("host", "host_gib")):
            planned, seen = entry[f"planned_{kind}_gib"], entry.get(key)
            columns.append(f"{kind} {planned:6.2f} {seen:6.2f} {100 * (planned / seen - 1):+5.0f} %" if seen else "")
        columns.append(f"reserved {entry.get('reserved_gpu_gib')}")
        lines.append(f"    {stage:8} {'   '.join(columns)}")
    return "\n".join(lines)


def main() -> None:
    """Measure every row that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="a folder with a checkpoint for each task, under its name")
    parser.add_argument("--only", nargs="+", default=["1.3B", "5B", "14B"], choices=sorted({row.group for row in ROWS}))
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of the rows of these groups")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings for each row")
    parser.add_argument("--work", type=Path, default=Path("/tmp/wan-dist-memory"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row.group in options.only]
    machine = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "torch": torch.__version__}
    file = options.out / f"memory-{'-'.join(options.only)}.json"
    done: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        if options.rows is not None and number not in options.rows:
            continue
        done.append(measure(row, options.checkpoints, options.work, options.settings))
        if os.environ.get("RANK", "0") == "0":
            print(describe(done[-1]), flush=True)
            file.write_text(json.dumps({"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": done}, indent=2) + "\n")


if __name__ == "__main__":
    main()
