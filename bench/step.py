"""Step time and peak memory of a published transformer on one GPU, beside diffusers.

    python -m bench.step --task i2v-14B --size 832x480 --frames 81
    python -m bench.step --task i2v-14B --attention fa4 cudnn --quant none fp8 --peer compiled
    python -m bench.step --task t2v-14B --quant fp8 --trained sla --passes 1

Random weights at full size, bfloat16. A step is both guidance passes, or one of them, with an image where the
task takes one.
Prints a table and writes bench/results/NAME.json.
"""

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.peers import diffusers_step, diffusers_transformer
from bench.random_model import random_inputs, random_transformer
from bench.record import Record
from wan_dist.models.attention.inner import choose_attention
from wan_dist.models.attention.vsa import choose_vsa_sparsity
from wan_dist.runtime.errors import InputError
from wan_dist.sampling.guidance import Guidance, VelocityPredictor
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import TASKS

GIB = 2**30


def timed(step: Callable[[], torch.Tensor], steps: int) -> dict[str, object]:
    """Return the median seconds of a step after the first, those of each step, and GiB before and at peak."""
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        velocity = step()
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
    assert torch.isfinite(velocity).all()
    peak = torch.cuda.max_memory_allocated()
    memory = {"weights_gib": round(weights / GIB, 2), "peak_gib": round(peak / GIB, 2)}
    return {"seconds_per_step": statistics.median(seconds[1:]), "all_seconds": seconds} | memory


def measure(
    task: Task,
    size: tuple[int, int],
    options: argparse.Namespace,
    backend: str,
    quant: str,
    trained: str | None = None,
) -> dict[str, object]:
    """Time our transformer with an attention backend and a quantization, or with trained attention."""
    device = torch.device("cuda")
    attention = choose_attention(backend, device=device, dtype=torch.bfloat16, head_dim=128)
    model = random_transformer(task, attention, device, quant=quant, trained_attention=trained)
    if trained == "vsa":
        model.set_vsa_sparsity(choose_vsa_sparsity(None, model.dims))
    latents, contexts, conditioning = random_inputs(task, size, options.frames, device)
    has_guidance = options.passes == 2
    predictor = VelocityPredictor(model, contexts[: options.passes], conditioning, latents)
    predict = Guidance(predictor, scale=5.0 if has_guidance else 1.0)
    del contexts
    name = f"ours, {trained or attention.name}, {quant}{'' if has_guidance else ', one pass'}"
    found = {"what": name} | timed(lambda: predict(latents, 700), options.steps)
    if options.profile:
        with torch.profiler.profile() as profile:
            predict(latents, 700)
            torch.cuda.synchronize()
        print(
            profile.key_averages().table(
                sort_by="self_device_time_total", row_limit=22, max_name_column_width=70
            )
        )
    return found


def measure_diffusers(
    task: Task, size: tuple[int, int], options: argparse.Namespace, *, compiled: bool
) -> dict[str, object]:
    """Time diffusers' transformer with cuDNN attention."""
    device = torch.device("cuda")
    model = diffusers_transformer(task, device)
    if compiled:
        model.compile_repeated_blocks()
    step = diffusers_step(model, task, size, options.frames, device)
    return {"what": f"diffusers, cudnn, {'compiled' if compiled else 'eager'}"} | timed(
        step, options.steps
    )


@torch.no_grad()
def main() -> None:
    """Measure the requested backends; one that does not work on this machine is reported and skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task",
        default="t2v-14B",
        choices=[name for name, task in TASKS.items() if task.transformer_dims],
    )
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--attention", nargs="*", default=["auto"])
    parser.add_argument("--quant", nargs="+", default=["none"])
    parser.add_argument("--trained", nargs="*", choices=["sla", "vsa"], default=[])
    parser.add_argument("--passes", type=int, choices=[1, 2], default=2)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--peer", nargs="*", choices=["eager", "compiled"], default=[])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    width, height = (int(side) for side in re.split("[*x]", options.size))
    name = f"step-{options.task}-{width}x{height}x{options.frames}"
    name += "-one-pass" if options.passes == 1 else ""
    record = Record(options.out / f"{name}.json", ["what"])
    task, size = TASKS[options.task], (width, height)
    runs: list[Callable[[], dict[str, object]]] = [
        partial(measure, task, size, options, backend, quant)
        for backend in options.attention
        for quant in options.quant
    ]
    runs += [
        partial(measure, task, size, options, "auto", quant, trained)
        for trained in options.trained
        for quant in options.quant
    ]
    runs += [
        partial(measure_diffusers, task, size, options, compiled=how == "compiled")
        for how in options.peer
    ]
    print(
        f"{options.task} {width}x{height}x{options.frames} on {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, bfloat16",
        flush=True,
    )
    for run in runs:
        try:
            row = run()
        except InputError as error:
            print(error)
            continue
        print(
            f"  {row['what']:32} {row['seconds_per_step']:7.3f} s/it   "
            f"first {row['all_seconds'][0]:6.2f} s   weights {row['weights_gib']:6.2f}   "
            f"peak {row['peak_gib']:6.2f} GiB",
            flush=True,
        )
        record.add(row)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
