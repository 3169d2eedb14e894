"""How the ranks of a run with jobs are cut into replicas, which make a video each. No torch."""

from dataclasses import replace

from wan_dist.catalog import get_task
from wan_dist.config import RunConfig
from wan_dist.degrees import Degrees
from wan_dist.errors import InputError
from wan_dist.hardware import Hardware
from wan_dist.image_sizes import SizeOfImage
from wan_dist.plan import Plan, arranged, make_plan

_HOST_BYTES = 2**60
"""What hosts have free differs between ranks, which must find the same; a run looks at its own later."""


def spread(
    configs: list[RunConfig],
    num_ranks: int,
    ranks_per_node: int,
    gpu_bytes: int | None,
    size_of_image: SizeOfImage | None = None,
) -> list[RunConfig]:
    """Return the configurations with the degrees of all axes, the same for all.

    Those that are given stay. Else the replicas are the smallest that hold a transformer whole, as ranks that need not wait for each
    other make the most videos, but no more than there are jobs. ``gpu_bytes``: of one GPU, None on a CPU. ``size_of_image``: see
    `make_plan`.
    """
    asked = configs[0].parallel
    if num_ranks == 1 or any(degree is not None for degree in (asked.dp, asked.cfg, asked.ring, asked.ulysses)):
        plan = make_plan(configs[0], ranks=(num_ranks, ranks_per_node), is_job=True, size_of_image=size_of_image)
        return _with(configs, plan.degrees)
    hardware = Hardware(gpu_bytes, _HOST_BYTES)
    kinds = {(config.task, config.ckpt_dir, config.size, config.max_area, config.frame_num): config for config in configs}
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0 and num_ranks // size <= len(configs)]
    for size in sizes:
        dp = num_ranks // size
        plans = [_plan(config, dp, (num_ranks, ranks_per_node), hardware, size_of_image) for config in kinds.values()]
        if size == sizes[-1] or all(plan is not None and plan.arrangement.dit == "resident" for plan in plans):
            degrees = next((plan.degrees for plan in plans if plan is not None), None)
            return configs if degrees is None else _with(configs, degrees)  # what is wrong is found with its line
    raise AssertionError


def _plan(
    config: RunConfig,
    dp: int,
    ranks: tuple[int, int],
    hardware: Hardware,
    size_of_image: SizeOfImage | None,
) -> Plan | None:
    """Return the plan with so many replicas, None if it does not fit."""
    config = replace(config, parallel=replace(config.parallel, dp=dp))
    try:
        plan = make_plan(config, ranks=ranks, is_job=True, size_of_image=size_of_image)
        return arranged(plan, config, hardware, get_task(config.task).models)
    except InputError:
        return None


def _with(configs: list[RunConfig], degrees: Degrees) -> list[RunConfig]:
    """Return the configurations with these degrees, in one object for all, as ``parallel`` is of the whole run."""
    parallel = replace(configs[0].parallel, **vars(degrees))
    return [replace(config, parallel=parallel) for config in configs]
