"""From the command to the video: when a run does what, of the first and of the following videos.

    python bench/checkpoint.py --task t2v-1.3B CHECKPOINTS/t2v-1.3B
    python -m bench.command_time CHECKPOINTS --task t2v-1.3B --times 2 preset=lightx2v-4step size=832x480
    python -m bench.command_time CHECKPOINTS --task i2v-14B --gpus 2 --videos 3 quant=fp8 attention=8bit ...

Starts the command as a user does, in a process of its own, and reads the clock as its lines arrive. Prints of
each run when its first line came, when each stage began and how long it took, and when the command had ended;
of several videos (a file of jobs) the seconds from one finished file to the next. ``--times`` repeats it:
what the first has to compile or to read from disk, later ones find in caches. Writes the file
bench/results/command-time.json.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.memory import noise_image
from bench.record import Record
from wan_dist.tasks.registry import TASKS


def build_command(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of one run, with a file of jobs where there are several videos."""
    launcher = [sys.executable, "-m", "wan_dist.run"]
    if options.gpus > 1:
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={options.gpus}", "-m", "wan_dist.run"),
        ]
    settings = [
        *(f"task={options.task}", f"ckpt_dir={options.checkpoints / options.task}"),
        f"output.dir={folder}",
        *options.settings,
    ]
    image = {}
    if TASKS[options.task].inputs.is_required:
        image = {"image": str(noise_image((832, 480), options.work))}
    if options.videos == 1:
        prompt = "prompt=two cats boxing on a stage"
        return [*launcher, *settings, prompt, *(f"{key}={value}" for key, value in image.items())]
    jobs = options.work / "jobs.jsonl"
    entries = [
        {"prompt": f"two cats boxing on a stage, take {number}", "seed": number, **image}
        for number in range(options.videos)
    ]
    jobs.write_text("\n".join(map(json.dumps, entries)))
    return [*launcher, *settings, f"jobs={jobs}"]


def run_once(options: argparse.Namespace, number: int) -> dict[str, object]:
    """Run the command once; returns the seconds since its start of what was seen."""
    folder = options.work / f"out-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    command = build_command(options, folder)
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    start = time.time()
    lines = []
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((round(time.time() - start, 2), line.rstrip()[:160]))
    end = time.time() - start
    if process.returncode:
        raise SystemExit("\n".join(line for _, line in lines[-20:]))
    first_line = next((seconds for seconds, line in lines if line.startswith("[")), None)
    files = sorted(folder.glob("*.mp4"), key=lambda file: file.stat().st_mtime)
    finished = [round(file.stat().st_mtime - start, 2) for file in files]
    records = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    stages = records[0]["stages"]
    return {
        "first_line": first_line,
        "stages": {
            name: [round(stage["began"] - start, 2), round(stage["seconds"], 2)]
            for name, stage in stages.items()
        },
        "step_seconds": [record["step_seconds"] for record in records],
        "video_finished": finished,
        "following": [round(later - sooner, 2) for sooner, later in itertools.pairwise(finished)],
        "ended": round(end, 2),
        "log": lines,
    }


def describe_run(run: dict[str, object]) -> str:
    """Return a run's timeline in a line for each stage."""
    stages, finished = run["stages"], run["video_finished"]
    assert isinstance(stages, dict)
    assert isinstance(finished, list)
    lines = [f"  first line at {run['first_line']:.2f} s"]
    lines += [
        f"    {name:10} at {began:6.2f}  took {took:6.2f}" for name, (began, took) in stages.items()
    ]
    lines.append(
        f"  video at {finished[0]:.2f} s, following {run['following']}, end {run['ended']:.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Run the command as often as requested; print and write the timelines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, help="a folder with a checkpoint for the task")
    parser.add_argument("settings", nargs="*", help="settings of the run")
    parser.add_argument("--task", default="t2v-1.3B", choices=TASKS)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--videos", type=int, default=1)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--label", default="", help="added to the row's name, e.g. before")
    parser.add_argument("--work", type=Path, default=Path("/tmp/wan-dist-command-time"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "command-time.json", ["what", "time"])
    what = (
        f"{options.task} {' '.join(options.settings)} {options.videos} videos {options.gpus} GPUs"
    )
    what = f"{what} {options.label}".strip()
    for number in range(options.times):
        run = run_once(options, number)
        print(f"{what}, run {number + 1}\n{describe_run(run)}", flush=True)
        del run["log"]
        record.add({"what": what, "time": number + 1, **run})


if __name__ == "__main__":
    main()
