"""Say what a run would do and how much memory each of its stages would take, without running it.

    python -m launch plan task=i2v-14B size=1280*720 gpus=8x80GB host=512GB
    python -m launch plan task=t2v-1.3B gpus=8GB host=16GB
    python -m launch plan task=t2v-14B                      # for this machine

Keys are those of a run, and: gpus=COUNTxSIZE of a node, host=SIZE, nodes=COUNT. Prompt and image may be left out.
"""

import sys

from launch.arguments import number_of, parted
from wan_dist.config.schema import RunConfig
from wan_dist.planning.hardware import Hardware, find_gpus, find_host, parse_bytes, parse_gpus
from wan_dist.planning.memory_table import table
from wan_dist.planning.plan import Plan, arranged, make_plan
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import configured

_HARDWARE = ("gpus", "host", "nodes")


def main(arguments: list[str]) -> None:
    """Print the plan; raises InputError for what cannot be."""
    given, settings = parted(arguments, _HARDWARE)
    config = configured(settings)
    if config is None:
        return
    hardware, ranks = hardware_of(given)
    plan = rehearsed(config, hardware, ranks)
    assert plan.budget is not None
    where = f"{ranks[0]} ranks, {plan.degrees}; " if ranks[0] > 1 else ""
    lines = [plan.summary, where + plan.arrangement.words, "", *table(plan.uses, plan.budget.gpu, plan.budget.host)]
    sys.stdout.write("\n".join(lines) + "\n")


def rehearsed(config: RunConfig, hardware: Hardware, ranks: tuple[int, int]) -> Plan:
    """Return the plan for this hardware and so many ranks, in all and on a node; prompt and images may be missing."""
    return arranged(make_plan(config, ranks=ranks, is_rehearsal=True), config, hardware, get_task(config.task).models)


def hardware_of(given: dict[str, str]) -> tuple[Hardware, tuple[int, int]]:
    """Return what these settings describe, and how many ranks there are, in all and on a node; what they leave out is this machine's."""
    count, gpu_bytes = 1, None
    if "gpus" in given:
        count, gpu_bytes = parse_gpus(given["gpus"])
    elif found := find_gpus():
        count, gpu_bytes = len(found), min(total for _, total, _ in found)
    host, limit = (parse_bytes(given["host"], "host"), "host") if "host" in given else find_host()
    nodes = number_of("nodes", given.get("nodes", "1"), "machines")
    return Hardware(gpu_bytes, host, limit), (count * nodes, count)
