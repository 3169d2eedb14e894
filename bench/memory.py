"""Memory of whole runs, planned against measured, over arrangements; with the time of their steps.

    python bench/checkpoint.py --task t2v-1.3B CHECKPOINTS/t2v-1.3B
    python bench/checkpoint.py --task i2v-14B CHECKPOINTS/i2v-14B --text-encoder-of CHECKPOINTS/t2v-1.3B
    python bench/memory.py CHECKPOINTS
    python bench/memory.py CHECKPOINTS --only ranks --ranks 4

The checkpoints have random weights at full size. Each row is a run in a process of its own, or in one for
each rank. Prints planned and measured GPU and host peaks (GiB) of each stage, with the difference, and
seconds a step; writes bench/results/memory-NAME.json.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import torch
from PIL import Image

from bench.record import this_run
from wan_dist.output.record import VideoRecord
from wan_dist.run import main as run
from wan_dist.sampling.guidance import VelocityPredictor


@dataclass(frozen=True)
class Row:
    """One run: the group it belongs to, its task and its settings."""

    group: str
    task: str
    settings: str = ""
    num_steps: int = 1

    @property
    def name(self) -> str:
        """Name of the row: task and settings."""
        return f"{self.task} {self.settings}".strip()


ROWS = (
    Row("1.3B", "t2v-1.3B"),
    Row(
        "1.3B",
        "t2v-1.3B",
        "memory.t5=stream memory.dit=stream memory.slice_tokens=2048 memory.passes=apart",
    ),
    Row("1.3B", "t2v-1.3B", "size=480x480 frame_num=33 memory.dit=stream memory.budget_gib=6"),
    Row("1.3B", "t2v-1.3B", "memory.vae=tiled memory.slice_tokens=8192"),
    Row("1.3B", "t2v-1.3B", "memory.dit=disk memory.t5=stream quant=none frame_num=41"),
    Row("1.3B", "t2v-1.3B", "quant=int8 memory.vae=whole frame_num=121"),
    Row("5B", "ti2v-5B", "frame_num=121"),
    Row("5B", "ti2v-5B", "frame_num=121 memory.budget_gib=7.2", 2),
    Row("5B", "ti2v-5B", "frame_num=121 memory.budget_gib=5.2", 2),
    Row("5B", "ti2v-5B", "frame_num=121 quant=fp8"),
    Row("5B", "ti2v-5B", "frame_num=121 memory=low image=IMAGE"),
    Row("14B", "i2v-14B", "size=832x480", 2),
    Row("14B", "i2v-14B", "size=832x480 memory.dit=stream", 2),
    Row("14B", "i2v-14B", "size=832x480 memory=low", 2),
    Row("14B", "i2v-14B", "size=832x480 memory=minimal memory.budget_gib=3.4", 2),
    Row("14B", "i2v-14B", "size=832x480 quant=fp8", 2),
    Row("14B", "i2v-14B", "size=832x480 quant=int8", 2),
    Row("14B", "i2v-14B", "size=832x480 quant=int4", 2),
    Row("14B", "i2v-14B", "size=832x480 quant=int4 memory.dit=stream", 2),
    Row("14B", "i2v-14B", "size=832x480 memory.budget_gib=22", 2),
    Row("14B", "i2v-14B", "size=1280x720 memory.slice_tokens=8192"),
    Row("VACE", "vace-14B", "size=832x480 src_ref_images=IMAGE", 2),
    Row("VACE", "vace-14B", "size=832x480 src_ref_images=IMAGE memory.budget_gib=8", 2),
    Row("Animate", "animate-14B", "size=1280x720 src_root_path=DRIVING", 2),
    Row("Animate", "animate-14B", "size=1280x720 src_root_path=DRIVING memory.budget_gib=12"),
    Row("ranks", "i2v-14B", "size=832x480", 2),
    Row("ranks", "i2v-14B", "size=832x480 parallel.cfg=1 fsdp.dit=false", 2),
    Row("ranks", "i2v-14B", "size=832x480 memory.dit=stream", 2),
    Row("ranks", "i2v-14B", "size=832x480 quant=fp8", 2),
    Row("ranks", "t2v-1.3B", ""),
)


@contextlib.contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each call of VelocityPredictor: all guidance passes of a step."""
    seconds: list[float] = []
    call = VelocityPredictor.__call__

    def timed(
        self: VelocityPredictor, latents: torch.Tensor, timestep: float
    ) -> list[torch.Tensor]:
        _wait()
        start = time.perf_counter()
        found = call(self, latents, timestep)
        _wait()
        seconds.append(round(time.perf_counter() - start, 3))
        return found

    VelocityPredictor.__call__ = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        VelocityPredictor.__call__ = call  # type: ignore[method-assign]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def noise_image(size: tuple[int, int], folder: Path) -> Path:
    """Write an image of noise of this size, one for each rank; returns the file."""
    image = folder / f"{size[0]}x{size[1]}-{os.environ.get('RANK', '0')}.png"
    Image.effect_noise(size, 80).convert("RGB").save(image)
    return image


def write_driving_folder(image: Path, size: tuple[int, int], folder: Path) -> Path:
    """Write a driving video of 77 frames of this size, with faces, for Animate; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, (width, height) in (("src_pose", size), ("src_face", (512, 512))):
        source = f"testsrc=size={width}x{height}:rate=30"
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-y",
            "-f",
            "lavfi",
            "-i",
            source,
        ]
        subprocess.run([*command, "-frames:v", "77", f"{folder / name}.mp4"], check=True)
    shutil.copy(image, folder / "src_ref.png")
    return folder


def timed_run(settings: list[str], folder: Path) -> tuple[int, list[float], VideoRecord | None]:
    """Run the command without cached prompts.

    Returns its exit code, the seconds of its steps, and its record: None on failure, and on ranks other than
    the first.
    """
    with timed_steps() as seconds:
        code = run(
            [
                *settings,
                "cache.dir=null",
                f"output.dir={folder}",
                "output.name=run",
                "output.save_latents=false",
            ]
        )
    record = None
    if code == 0 and os.environ.get("RANK", "0") == "0":
        record = VideoRecord.from_json(json.loads((folder / "run.json").read_text()))
    return code, seconds, record


def measure(row: Row, checkpoints: Path, out: Path, extra: list[str]) -> dict[str, object]:
    """Run a row; returns the seconds of its steps and the memory in its record."""
    width, height = 1280, 704
    if "size=" in row.settings:
        width, height = re.findall(r"size=(\d+)x(\d+)", row.settings)[-1]
    image = noise_image((int(width), int(height)), out)
    settings = [
        f"task={row.task}",
        f"ckpt_dir={checkpoints / row.task}",
        "prompt=two cats boxing on a stage",
        f"sample.steps={row.num_steps}",
    ]
    settings += [f"image={image}"] if row.task.startswith("i2v") else []
    given = row.settings.replace("IMAGE", str(image))
    if "DRIVING" in given:  # which has the size
        folder = write_driving_folder(image, (int(width), int(height)), out / "driving")
        given = re.sub(r"size=\S+ ", "", given).replace("DRIVING", str(folder))
    settings += given.split()
    code, seconds, record = timed_run([*settings, *extra], out)
    found: dict[str, object] = {
        "row": row.name,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "code": code,
    }
    found["machine"] = this_run()
    if record is not None:
        found |= {
            "arrangement": record.arrangement,
            "attention": record.attention,
            "seconds": seconds,
        }
        found |= {
            key: value
            for key, value in record.to_json().items()
            if key in ("stages", "other_ranks", "memory", "ran_out", "stepped_down_to")
        }
    return found


def describe(found: dict[str, object]) -> str:
    """Return a row's table: planned and measured peaks of each stage."""
    memory = found.get("memory")
    lines = [f"{found['row']}: code {found['code']}, steps {found.get('seconds')}"]
    for stage, entry in memory.items() if isinstance(memory, dict) else ():
        columns = []
        for kind, key in (("gpu", "peak_gpu_gib"), ("host", "host_gib")):
            planned, seen = entry[f"planned_{kind}_gib"], entry.get(key)
            column = ""
            if seen:
                column = f"{kind} {planned:6.2f} {seen:6.2f} {100 * (planned / seen - 1):+5.0f} %"
            columns.append(column)
        columns.append(f"reserved {entry.get('reserved_gpu_gib')}")
        lines.append(f"    {stage:8} {'   '.join(columns)}")
    return "\n".join(lines)


def in_a_process(row: int, options: argparse.Namespace) -> dict[str, object]:
    """Measure a row in a process of its own, or in one for each rank, which log to this terminal."""
    torchrun = []
    if options.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={options.ranks}"]
    result = options.work / "result.json"
    result.unlink(missing_ok=True)
    given = [
        str(options.checkpoints),
        "--row",
        str(row),
        "--work",
        str(options.work),
        "--settings",
        *options.settings,
    ]
    # As `launch local` sets it; it has no effect once torch is imported.
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, *torchrun, __file__, *given],
            check=False,
            env=environment,
            timeout=options.timeout,
        )
    if result.exists():
        return json.loads(result.read_text())
    return {"row": ROWS[row].name, "ranks": options.ranks, "code": "none"}


def main() -> None:
    """Measure the requested rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints", type=Path, help="a folder with a checkpoint for each task, under its name"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["1.3B", "5B", "14B"],
        choices=sorted({row.group for row in ROWS}),
    )
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of the rows of these groups")
    parser.add_argument("--row", type=int, help="measure this one of all rows in this process")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a row")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings for each row")
    parser.add_argument("--work", type=Path, default=Path("/tmp/wan-dist-memory"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.row is not None:
        found = measure(ROWS[options.row], options.checkpoints, options.work, options.settings)
        if os.environ.get("RANK", "0") == "0":
            (options.work / "result.json").write_text(json.dumps(found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [number for number, row in enumerate(ROWS) if row.group in options.only]
    chosen = chosen if options.rows is None else [chosen[number] for number in options.rows]
    file = options.out / f"memory-{'-'.join(options.only)}-{options.ranks}gpu.json"
    done: list[dict[str, object]] = []
    for number in chosen:
        done.append(in_a_process(number, options))
        print(describe(done[-1]), flush=True)
        file.write_text(
            json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": done}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
