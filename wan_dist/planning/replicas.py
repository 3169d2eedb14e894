"""How the ranks of a run with jobs are cut into replicas, which make a video each. No torch."""

import math
from dataclasses import replace

from wan_dist.config.schema import RunConfig
from wan_dist.planning.degrees import Degrees, plan_degrees
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.plan import Plan, arranged, heads_of, make_plan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import SizeOfImage
from wan_dist.tasks.registry import get_task

_HOST_BYTES = 2**60
"""What hosts have free differs between ranks, which must find the same; a run looks at its own later."""


def spread(
    configs: list[RunConfig], num_ranks: int, ranks_per_node: int, gpu_bytes: int | None, size_of_image: SizeOfImage | None = None
) -> list[RunConfig]:
    """Return the configurations with the degrees of all axes, the same for all, whatever their order.

    Those that are given stay. Else the replicas are the smallest that hold a transformer whole, as ranks that need not wait for each
    other make the most videos, but no more than there are jobs. ``gpu_bytes``: of one GPU, None on a CPU; ``size_of_image``: see
    `make_plan`. Raises InputError, with the job and what to put on the command line, for degrees that are given and do not suit all jobs.
    """
    asked = configs[0].parallel
    given = {key: degree for key in ("dp", "cfg", "ring", "ulysses") if (degree := getattr(asked, key)) is not None}
    kinds = {_kind(config): config for config in configs}
    num_heads = math.gcd(*(heads_of(config) for config in kinds.values()))
    guided = all(map(_is_guided, kinds.values()))
    if num_ranks == 1 or given:
        _check_given(given, list(kinds.values()), num_heads)
        degrees = plan_degrees(num_ranks, ranks_per_node=ranks_per_node, num_heads=num_heads, guided=guided, **given)
        return _with(configs, degrees)
    hardware = Hardware(gpu_bytes, _HOST_BYTES)
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0 and num_ranks // size <= len(configs)]
    found: Degrees | None = None
    for size in sizes:
        degrees = plan_degrees(num_ranks, ranks_per_node=ranks_per_node, num_heads=num_heads, guided=guided, dp=num_ranks // size)
        plans = [_plan(config, (num_ranks, ranks_per_node), hardware, size_of_image) for config in _with(list(kinds.values()), degrees)]
        if all(plan is not None and plan.arrangement.dit == "resident" for plan in plans):
            return _with(configs, degrees)
        if None not in plans:
            found = degrees
    return _with(configs, found or degrees)  # what is wrong with a job is found with its line


def _kind(config: RunConfig) -> tuple[object, ...]:
    """Return what degrees and memory depend on, the same for jobs of one kind."""
    video = (config.size, config.max_area, config.frame_num, config.latents is None)
    models = (config.task, config.ckpt_dir, config.dit_file, config.dtype, config.quant, config.attention)
    return (*video, *models, _is_guided(config), repr(config.memory), repr(config.fsdp), repr(config.cache))


def _is_guided(config: RunConfig) -> bool:
    return config.sample.guide_scales() != (1, 1)


def _check_given(given: dict[str, int], configs: list[RunConfig], num_heads: int) -> None:
    """Raise InputError for degrees that suit some jobs and not others; what suits none is said by `plan_degrees`."""
    unguided = [config for config in configs if not _is_guided(config)]
    if given.get("cfg") == 2 and 0 < len(unguided) < len(configs):
        raise InputError(
            f"parallel.cfg=2 needs guidance, but sample.guide_scale=1 turns it off in some jobs ({_named(unguided)}) and not in others; "
            "use parallel.cfg=1, or a file of jobs for each"
        )
    ulysses = given.get("ulysses", 1)
    wrong = [config for config in configs if ulysses > 0 and heads_of(config) % ulysses]
    if wrong and len(set(map(heads_of, configs))) > 1:
        legal = ", ".join(str(degree) for degree in range(1, num_heads + 1) if num_heads % degree == 0)
        raise InputError(
            f"parallel.ulysses={ulysses} does not divide the {heads_of(wrong[0])} heads of some jobs ({_named(wrong)}); "
            f"for all jobs it may be {legal}: use one of these, leave it out, or use a file of jobs for each"
        )


def _named(configs: list[RunConfig]) -> str:
    return f"{configs[0].output.name}, of {configs[0].task}"


def _plan(config: RunConfig, ranks: tuple[int, int], hardware: Hardware, size_of_image: SizeOfImage | None) -> Plan | None:
    """Return the plan with the degrees that are given, None if it does not fit."""
    try:
        plan = make_plan(config, ranks=ranks, is_job=True, size_of_image=size_of_image)
        return arranged(plan, config, hardware, get_task(config.task).models)
    except InputError:
        return None


def _with(configs: list[RunConfig], degrees: Degrees) -> list[RunConfig]:
    """Return the configurations with these degrees, in one object for all, as ``parallel`` is of the whole run."""
    parallel = replace(configs[0].parallel, **vars(degrees))
    return [replace(config, parallel=parallel) for config in configs]
