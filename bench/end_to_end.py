"""End-to-end time of a run by stage, from command to video, with a random checkpoint at full size.

    python bench/checkpoint.py --task i2v-14B CHECKPOINTS/i2v-14B
    python -m bench.end_to_end CHECKPOINTS --task i2v-14B size=832x480 sample.steps=4
    torchrun --nproc_per_node=2 -m bench.end_to_end CHECKPOINTS --task i2v-14B size=832x480 sample.steps=4

Prints each stage's seconds, and an estimate for the task's own number of steps from the fastest step after
the first; writes bench/results/end-to-end-TASK-SIZE-GPUS.json.
"""

import argparse
import json
import os
import time
from pathlib import Path

from bench.memory import noise_image, timed_run
from bench.record import this_run
from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.tasks.registry import TASKS


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints", type=Path, help="a folder with a checkpoint for each task, under its name"
    )
    parser.add_argument("settings", nargs="*", help="settings of the run")
    parser.add_argument(
        "--task",
        default="i2v-14B",
        choices=[name for name, task in TASKS.items() if len(task.inputs.file_keys) < 2],
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/wan-dist-end-to-end"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser.parse_intermixed_args()


def main() -> None:
    """Run once; print the seconds of each stage and write them."""
    options = parse_arguments()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    options.work.mkdir(parents=True, exist_ok=True)
    settings = [
        f"task={options.task}",
        f"ckpt_dir={options.checkpoints / options.task}",
        "prompt=two cats boxing on a stage",
        *options.settings,
    ]
    default = compose_config(prepare_arguments([f"task={options.task}"]))
    config = compose_config(prepare_arguments(settings))
    assert default is not None
    assert config is not None
    if TASKS[options.task].inputs.is_required:
        settings.append(f"image={noise_image(config.parse_size(), options.work)}")
    start = time.perf_counter()
    code, seconds, record = timed_run(settings, options.work)
    total = time.perf_counter() - start
    if code:
        raise SystemExit(code)
    if record is None:
        return
    width, height = config.parse_size()
    for name, stage in (record.stages or {}).items():
        print(f"  {name:10} {stage['seconds']:8.2f} s  {100 * stage['seconds'] / total:5.1f} %")
    whole = total + (default.sample.steps - config.sample.steps) * min(seconds[1:] or seconds)
    print(
        f"  {'in all':10} {total:8.2f} s, with {default.sample.steps} steps {whole:.0f} s; steps {seconds}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "task": options.task,
        "settings": options.settings,
        "machine": this_run(),
        "seconds": total,
    }
    found |= {
        "with_default_steps": whole,
        "step_seconds": seconds,
        "attention": record.attention,
        "stages": record.stages,
    }
    file = options.out / f"end-to-end-{options.task}-{width}x{height}-{num_ranks}gpu.json"
    file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
