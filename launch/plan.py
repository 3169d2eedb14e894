"""Plan a run without running it: its arrangement, and the memory of each of its stages.

    python -m launch plan task=i2v-14B size=1280x720 gpus=8x80GB host=512GB
    python -m launch plan task=t2v-1.3B gpus=8GB host=16GB
    python -m launch plan task=t2v-14B preset=lightx2v-4step gpus=8xH200
    python -m launch plan task=t2v-14B                      # for this machine

Keys are those of a run, and: gpus=COUNTxSIZE of a node, or COUNTxNAME of a GPU (a100, a100-40, h100, h200,
l40s), host=SIZE, nodes=COUNT. Prompt and image may be left out.
"""

import re
import sys

from launch.arguments import parse_count, split_arguments
from launch.slurm.cluster import list_cluster_names, load_cluster
from wan_dist.config.schema import RunConfig
from wan_dist.planning.hardware import (
    Hardware,
    find_gpus,
    find_host_memory,
    parse_bytes,
    parse_gpus,
)
from wan_dist.planning.memory_table import format_memory_table
from wan_dist.planning.plan import RunPlan, make_plan, plan_memory
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

_HARDWARE_KEYS = ("gpus", "host", "nodes")


def main(arguments: list[str]) -> None:
    """Print the plan; raises InputError for invalid settings."""
    options, settings = split_arguments(arguments, _HARDWARE_KEYS)
    config = read_config(settings)
    if config is None:
        return
    hardware, ranks = resolve_hardware(options)
    plan = plan_dry_run(config, hardware, ranks)
    ranks_text = f"{ranks[0]} ranks, {plan.degrees}; " if ranks[0] > 1 else ""
    lines = [
        plan.summary,
        plan.sampling.description,
        *plan.notes,
        ranks_text + plan.arrangement.description,
        *([plan.gguf_note] if plan.gguf_note else []),
        "",
        *format_memory_table(plan.stage_memories, plan.budget.gpu_bytes, plan.budget.host_bytes),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def plan_dry_run(config: RunConfig, hardware: Hardware, ranks: tuple[int, int]) -> RunPlan:
    """Return the plan of a dry run on this hardware; prompt and images may be missing.

    ``ranks``: their number in all, and on a node.
    """
    return plan_memory(
        make_plan(config, ranks=ranks, is_dry_run=True),
        hardware,
        get_task(config.task).model_dims,
    )


def _parse_gpus(text: str) -> tuple[int, int]:
    """Return how many GPUs and the bytes of each, of their size or of a name in conf/cluster/."""
    known_names = list_cluster_names()
    match = re.fullmatch(r"(\d+\s*[x*×]\s*)?([a-z][\w-]*)", text.lower().strip())
    if match is not None and match[2] in known_names:
        return parse_gpus(f"{match[1] or ''}{load_cluster(match[2], []).gpu_memory}")
    try:
        return parse_gpus(text)
    except InputError as error:
        raise InputError(f"{error}, or gpus=NAME of {', '.join(known_names)}") from None


def resolve_hardware(options: dict[str, str]) -> tuple[Hardware, tuple[int, int]]:
    """Return the hardware that ``options`` describe, and the number of ranks in all and on a node.

    Keys that are left out have this machine's values.
    """
    gpus_per_node, gpu_bytes = 1, None
    if "gpus" in options:
        gpus_per_node, gpu_bytes = _parse_gpus(options["gpus"])
    elif gpus := find_gpus():
        gpus_per_node, gpu_bytes = len(gpus), min(total_bytes for _, total_bytes, _ in gpus)
    host_bytes, host_limit = (
        (parse_bytes(options["host"], "host"), "host") if "host" in options else find_host_memory()
    )
    num_nodes = parse_count("nodes", options.get("nodes", "1"), "machines")
    return Hardware(gpu_bytes, host_bytes, host_limit), (gpus_per_node * num_nodes, gpus_per_node)
