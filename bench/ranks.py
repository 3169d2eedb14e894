"""Step time of a published transformer on several GPUs, for each parallel layout, beside diffusers.

    torchrun --nproc_per_node=4 -m bench.ranks --task i2v-14B --size 832x480 --frames 81 --peer

Random weights at full size, bfloat16, both guidance passes in a step. Prints a table and writes
bench/results/NAME.json.
"""

import argparse
import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bench.peers import diffusers_step, diffusers_transformer
from bench.random_model import random_inputs, random_transformer
from bench.record import Record
from wan_dist.models.attention.inner import choose_attention
from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.cfg import ParallelGuidance
from wan_dist.parallel.mesh import open_process_groups, select_local_device
from wan_dist.planning.degrees import Degrees
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.sampling.guidance import Guidance, VelocityPredictor
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import TASKS

GIB = 2**30


def spreads(num_ranks: int) -> dict[str, tuple[Degrees, bool, str]]:
    """Return the parallel layouts by name.

    Of each: the degrees, whether weights are sharded, and the implementation of Ulysses and ring
    (``parallel.usp``).
    """
    half = num_ranks // 2
    return {
        "ulysses": (Degrees(ulysses=num_ranks), False, "plain"),
        "ulysses-sharded": (Degrees(ulysses=num_ranks), True, "plain"),
        "cfg-ulysses": (Degrees(cfg=2, ulysses=half), False, "plain"),
        "cfg-ulysses-sharded": (Degrees(cfg=2, ulysses=half), True, "plain"),
        "cfg-ring": (Degrees(cfg=2, ring=half), False, "plain"),
        "ring-ulysses": (Degrees(ring=2, ulysses=half), False, "plain"),
        "ring-ulysses-xfuser": (Degrees(ring=2, ulysses=half), False, "xfuser"),
    }


def timed(predict: Callable[[], torch.Tensor], steps: int) -> tuple[list[float], torch.Tensor]:
    """Return the seconds of each step, the first one included, and the last result."""
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = predict()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def row(name: str, seconds: list[float], weights: int) -> dict[str, object]:
    """Return a row of the table; memory is the maximum over all ranks."""
    peak = torch.tensor(
        [weights, torch.cuda.max_memory_allocated()], device="cuda", dtype=torch.float64
    )
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "spread": name,
        "seconds_per_step": round(statistics.median(seconds[1:]), 3),
        "all_seconds": [round(second, 3) for second in seconds],
        "weights_gib": round(peak[0].item() / GIB, 2),
        "peak_gib": round(peak[1].item() / GIB, 2),
    }


def measure(
    task: Task,
    options: argparse.Namespace,
    size: tuple[int, int],
    spread: tuple[Degrees, bool, str],
) -> dict[str, object]:
    """Time our transformer in one parallel layout."""
    device = torch.device("cuda", torch.cuda.current_device())
    degrees, shard, usp = spread
    with open_process_groups(degrees, device, timeout_seconds=600) as groups:
        attention = choose_attention(
            options.attention, device=device, dtype=torch.bfloat16, head_dim=128
        )
        model = random_transformer(
            task,
            attention,
            device,
            lambda model: parallelize_transformer(model, groups, is_sharded=shard, usp=usp),
        )
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        latents, contexts, conditioning = random_inputs(task, size, options.frames, device)
        own = [contexts[groups.cfg.rank]] if degrees.cfg == 2 else contexts
        velocities = VelocityPredictor(model, own, conditioning, latents)
        predict: Callable[[torch.Tensor, int], torch.Tensor] = Guidance(velocities, scale=5.0)
        if degrees.cfg == 2:
            predict = ParallelGuidance(velocities, scale=5.0, axis=groups.cfg)
        del contexts, own
        seconds, velocity = timed(lambda: predict(latents, 700), options.steps)
        assert torch.isfinite(velocity).all()
        return row(
            f"{degrees}{', sharded' if shard else ''}, {attention.name}, {usp}", seconds, weights
        )


def measure_diffusers(
    task: Task, options: argparse.Namespace, size: tuple[int, int]
) -> dict[str, object]:
    """Time diffusers' transformer with its own context parallelism (Ulysses) and cuDNN attention.

    Its blocks are compiled with --compile.
    """
    from diffusers import ContextParallelConfig

    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        "nccl", device_id=device
    )  # process groups are free: this is measured last
    model = diffusers_transformer(task, device)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    if options.compile:
        model.compile_repeated_blocks()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(diffusers_step(model, task, size, options.frames, device), options.steps)
    how = "compiled" if options.compile else "eager"
    return row(
        f"diffusers, context parallel ulysses {dist.get_world_size()}, cudnn, {how}",
        seconds,
        weights,
    )


@torch.no_grad()
def main() -> None:
    """Measure the requested layouts, and diffusers with --peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", default="i2v-14B", choices=[name for name in TASKS if name != "toy"]
    )
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--attention", default="auto")
    parser.add_argument(
        "--only", nargs="*", help="names of spreads, e.g. ulysses ulysses-sharded; default: all"
    )
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--compile", action="store_true", help="the peer's blocks")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    width, height = (int(side) for side in re.split("[*x]", options.size))
    select_local_device("cuda")
    num_ranks, task = read_rank_layout().num_ranks, TASKS[options.task]
    runs: list[Callable[[], dict[str, object]]] = [
        lambda spread=spread: measure(task, options, (width, height), spread)
        for name, spread in spreads(num_ranks).items()
        if not options.only or name in options.only
    ]
    if options.peer:
        runs.append(lambda: measure_diffusers(task, options, (width, height)))
    record = Record(
        options.out / f"ranks-{options.task}-{width}x{height}x{options.frames}-{num_ranks}gpu.json",
        ["spread"],
    )
    for run in runs:
        try:
            found = run()
        except Exception as error:  # one layout's failure must not hide the others' figures
            found = {"spread": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}"}
        if int(os.environ["RANK"]) == 0:
            print(found, flush=True)
            record.add(found)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
