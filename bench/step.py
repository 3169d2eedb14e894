"""Time one denoising step of a published transformer at full size with random weights, and its peak memory, per attention backend.

    python bench/step.py --task t2v-14B --size 832*480 --frames 81

A step is both guidance passes, with an image where the task takes one. Prints a table and writes bench/results/NAME.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from random_model import random_inputs, random_transformer

from wan_dist.catalog import TASKS, Task
from wan_dist.errors import InputError
from wan_dist.models.attention import choose_attention
from wan_dist.sampling.denoise import Guidance

GIB = 2**30


def measure(task: Task, size: tuple[int, int], frames: int, backend: str, steps: int) -> dict[str, object]:
    """Return seconds a step (median), the first step's seconds, and GiB of the weights and at peak."""
    device = torch.device("cuda")
    attention = choose_attention(backend, device=device, dtype=torch.bfloat16, head_dim=128)
    model = random_transformer(task, attention, device)
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    latents, contexts, conditioning = random_inputs(task, size, frames, device)
    predict = Guidance(model, contexts, conditioning, latents, scale=5.0)
    seconds = []
    for _ in range(steps + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        velocity = predict(latents, 700)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert torch.isfinite(velocity).all()
    return {
        "attention": attention.name,
        "seconds_per_step": round(statistics.median(seconds[1:]), 3),
        "all_seconds": [round(second, 3) for second in seconds],
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }


@torch.no_grad()
def main() -> None:
    """Measure every backend that was asked for and works here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-14B", choices=[name for name, task in TASKS.items() if task.transformer])
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("*"))
    rows = []
    for backend in options.attention:
        try:
            rows.append(measure(TASKS[options.task], (width, height), options.frames, backend, options.steps))
        except InputError as fault:
            print(fault)
        torch.cuda.empty_cache()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{options.task}-{width}x{height}x{options.frames}.json"
    (options.out / name).write_text(json.dumps({"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=2) + "\n")
    print(f"{options.task} {width}x{height}x{options.frames} on {machine['gpu']}, torch {machine['torch']}, bfloat16")
    for row in rows:
        memory = f"weights {row['weights_gib']:6.2f} GiB   peak {row['peak_gib']:6.2f} GiB"
        print(f"  {row['attention']:6} {row['seconds_per_step']:7.3f} s/it   {memory}")


if __name__ == "__main__":
    main()
