"""Data-parallel replicas: split the ranks of a run with jobs into groups for one video each; no torch."""

import math
from dataclasses import replace

from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import LOADING
from wan_dist.config.weight_files import list_weight_files
from wan_dist.planning.degrees import Degrees, plan_degrees, read_num_heads
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.plan import RunPlan, make_plan, plan_memory
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import ImageSizeReader
from wan_dist.tasks.registry import get_task

_ASSUMED_HOST_BYTES = 2**60
"""Host memory while degrees are chosen, in effect unlimited.

Free memory differs between hosts, and all ranks must choose the same degrees; a run checks its own host
later.
"""


def assign_degrees(
    configs: list[RunConfig],
    num_ranks: int,
    ranks_per_node: int,
    gpu_bytes: int | None,
    image_size_reader: ImageSizeReader | None = None,
    *,
    is_dry_run: bool = False,
) -> list[RunConfig]:
    """Return the configurations with the degrees of all axes, the same for all, whatever their order.

    Requested degrees stay. Else the replicas are the smallest that hold a transformer whole, as ranks that
    need not wait for each other make the most videos, but no more than there are jobs. ``gpu_bytes``: of one
    GPU, None on a CPU; ``image_size_reader`` and ``is_dry_run``: see `make_plan`. Raises InputError, with the
    job and what to put on the command line, for requested degrees that do not suit all jobs.
    """
    parallel_config = configs[0].parallel
    requested_degrees = {
        key: degree
        for key in ("dp", "cfg", "ring", "ulysses")
        if (degree := getattr(parallel_config, key)) is not None
    }
    config_by_kind = {_get_memory_key(config): config for config in configs}
    num_heads = math.gcd(*(_read_num_heads(config) for config in config_by_kind.values()))
    is_guided = all(map(_is_guided, config_by_kind.values()))
    if num_ranks == 1 or requested_degrees:
        _check_requested_degrees(requested_degrees, list(config_by_kind.values()), num_heads)
        degrees = plan_degrees(
            num_ranks,
            ranks_per_node=ranks_per_node,
            num_heads=num_heads,
            is_guided=is_guided,
            **requested_degrees,
        )
        return _replace_degrees(configs, degrees)
    hardware = Hardware(gpu_bytes, _ASSUMED_HOST_BYTES)
    replica_sizes = [
        replica_size
        for replica_size in range(1, num_ranks + 1)
        if num_ranks % replica_size == 0 and num_ranks // replica_size <= len(configs)
    ]
    fitting_degrees: Degrees | None = None
    for replica_size in replica_sizes:
        degrees = plan_degrees(
            num_ranks,
            ranks_per_node=ranks_per_node,
            num_heads=num_heads,
            is_guided=is_guided,
            dp=num_ranks // replica_size,
        )
        plans = [
            _plan_if_it_fits(
                config,
                (num_ranks, ranks_per_node),
                hardware,
                image_size_reader,
                is_dry_run=is_dry_run,
            )
            for config in _replace_degrees(list(config_by_kind.values()), degrees)
        ]
        if all(plan is not None and plan.arrangement.dit == "resident" for plan in plans):
            return _replace_degrees(configs, degrees)
        if None not in plans:
            fitting_degrees = degrees
    # Where nothing fits, the error is raised when the job is planned, with its line of the file.
    return _replace_degrees(configs, fitting_degrees or degrees)


def _get_memory_key(config: RunConfig) -> tuple[object, ...]:
    """Return the key of all that degrees and memory depend on; jobs with the same key are planned once."""
    video_settings = (config.size, config.max_area, config.frame_num, config.latents is None)
    # A source video decides on the number of frames.
    source_settings = (config.src_video, config.src_mask, config.src_ref_images)
    driving_settings = (config.src_root_path, config.src_pose, config.refert_num)
    # So do the sound and its clips.
    speech_settings = (config.audio, config.num_clip, config.infer_frames, config.start_from_ref)
    model_settings = repr(read_settings(config, LOADING))
    return (
        *video_settings,
        *source_settings,
        *driving_settings,
        *speech_settings,
        model_settings,
        _is_guided(config),
        repr(config.cache),
    )


def _read_num_heads(config: RunConfig) -> int:
    return read_num_heads(
        get_task(config.task), config.ckpt_dir, list_weight_files(config).get("dit_file", [])
    )


def _is_guided(config: RunConfig) -> bool:
    return config.sample.parse_guide_scales() != (1, 1)


def _check_requested_degrees(
    requested_degrees: dict[str, int], configs: list[RunConfig], num_heads: int
) -> None:
    """Raise InputError for degrees that suit some jobs only; `plan_degrees` refuses those that suit none."""
    unguided_configs = [config for config in configs if not _is_guided(config)]
    if requested_degrees.get("cfg") == 2 and 0 < len(unguided_configs) < len(configs):
        raise InputError(
            "parallel.cfg=2 needs guidance, but sample.guide_scale=1 turns it off in some jobs "
            f"({_describe_first_job(unguided_configs)}) and not in others; "
            "use parallel.cfg=1, or a job file for each"
        )
    ulysses = requested_degrees.get("ulysses", 1)
    unsuitable_configs = [
        config for config in configs if ulysses > 0 and _read_num_heads(config) % ulysses
    ]
    if unsuitable_configs and len(set(map(_read_num_heads, configs))) > 1:
        legal_degrees = ", ".join(
            str(degree) for degree in range(1, num_heads + 1) if num_heads % degree == 0
        )
        raise InputError(
            f"parallel.ulysses={ulysses} does not divide the {_read_num_heads(unsuitable_configs[0])} "
            f"heads of some jobs ({_describe_first_job(unsuitable_configs)}); "
            f"for all jobs it may be {legal_degrees}: use one of these, leave it out, "
            "or use a job file for each"
        )


def _describe_first_job(configs: list[RunConfig]) -> str:
    return f"{configs[0].output.name}, of {configs[0].task}"


def _plan_if_it_fits(
    config: RunConfig,
    ranks: tuple[int, int],
    hardware: Hardware,
    image_size_reader: ImageSizeReader | None,
    *,
    is_dry_run: bool,
) -> RunPlan | None:
    """Return the plan with the degrees of ``config``, None if it does not fit."""
    try:
        plan = make_plan(
            config,
            ranks=ranks,
            is_job=True,
            is_dry_run=is_dry_run,
            image_size_reader=image_size_reader,
        )
        return plan_memory(plan, hardware, get_task(config.task).model_dims)
    except InputError:
        return None


def _replace_degrees(configs: list[RunConfig], degrees: Degrees) -> list[RunConfig]:
    """Return the configurations with these degrees, in one object, as ``parallel`` is of the whole run."""
    parallel_config = replace(configs[0].parallel, **vars(degrees))
    return [replace(config, parallel=parallel_config) for config in configs]
