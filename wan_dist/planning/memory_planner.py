"""Memory planner: choose the fastest arrangement of a run that fits, or say what would fit; no torch.

The stages of a run follow each other, so each is arranged on its own: text encoder, transformer, VAE.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from wan_dist.config.sections import MemoryConfig
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_estimate import (
    DRIVER_CONTEXT_BYTES,
    FRAGMENTATION_BYTES,
    LATER_NCCL_GPU_BYTES,
    NCCL_GPU_BYTES,
    StageMemory,
    estimate_memory,
)
from wan_dist.planning.parameter_bytes import count_vae_weight_bytes
from wan_dist.planning.vae_memory import WHOLE_VAE, VaeStrategy, find_fitting_strategies
from wan_dist.planning.workload import GIB, Arrangement, Workload
from wan_dist.runtime.errors import InputError

_MEMORY_SETTINGS = ("dit", "gguf", "t5", "slice_tokens", "passes", "vae")
_STEP_SLOWDOWN: dict[str, dict[Any, float]] = {
    "dit": {"resident": 0.0, "stream": 0.03, "disk": 1.0},
    "gguf": {"decoded": 0.0, "compressed": 0.015},
    "passes": {"together": 0.0, "apart": 0.02},
    "slice_tokens": {None: 0.0, 8192: 0.01, 2048: 0.06, 512: 0.2},
}
"""Approximate slowdown of a step, as a fraction of its time, by setting and value; orders arrangements."""
_PREDICTION_TOLERANCE = 0.9
"""Fraction of a prediction that a stage takes at least, as predictions may be too high.

What the user has requested is refused only if it would not fit even then.
"""


@dataclass(frozen=True)
class Budget:
    """Memory budget of a run, in bytes."""

    gpu_bytes: int | None
    """On each rank's GPU, for PyTorch's tensors; None: all tensors are on the host."""
    host_bytes: int
    """On a node, for all its ranks."""
    host_limit_name: str = "free memory"

    def list_shortages(
        self, stage: StageMemory, ranks_per_node: int, scale: float = 1.0
    ) -> list[str]:
        """Return a text for each memory, GPU or host, of which a stage would need more; empty if it fits.

        ``scale``: factor on the predicted bytes.
        """
        if self.gpu_bytes is None:
            needed_gpu_bytes, needed_host_bytes = (
                0,
                stage.host_bytes + stage.gpu_bytes * ranks_per_node,
            )
        else:
            needed_gpu_bytes, needed_host_bytes = stage.gpu_bytes, stage.host_bytes
        shortages = []
        if self.gpu_bytes is not None and needed_gpu_bytes * scale > self.gpu_bytes:
            shortages.append(
                f"{needed_gpu_bytes / GIB:.1f} GiB of GPU memory, "
                f"of which {self.gpu_bytes / GIB:.1f} can be used"
            )
        if needed_host_bytes * scale > self.host_bytes:
            shortages.append(
                f"{needed_host_bytes / GIB:.1f} GiB of host memory, "
                f"of which {self.host_bytes / GIB:.1f} can be used ({self.host_limit_name})"
            )
        return shortages


def compute_budget(hardware: Hardware, memory: MemoryConfig, num_ranks: int = 1) -> Budget:
    """Return the budget on this hardware, less what the driver and NCCL take outside PyTorch's count.

    The user's limits count where they are lower.
    """
    gpu_bytes = hardware.gpu_bytes
    if gpu_bytes is not None:
        gpu_bytes -= FRAGMENTATION_BYTES if hardware.has_driver_context else DRIVER_CONTEXT_BYTES
        if num_ranks > 1:
            gpu_bytes -= LATER_NCCL_GPU_BYTES if hardware.has_driver_context else NCCL_GPU_BYTES
        if memory.budget_gib is not None:
            gpu_bytes = min(gpu_bytes, int(memory.budget_gib * GIB))
    host_bytes, host_limit_name = hardware.host_bytes, hardware.host_limit_name
    if memory.host_budget_gib is not None and memory.host_budget_gib * GIB < host_bytes:
        host_bytes, host_limit_name = int(memory.host_budget_gib * GIB), "memory.host_budget_gib"
    return Budget(gpu_bytes, host_bytes, host_limit_name)


def choose_arrangement(
    workload: Workload,
    memory: MemoryConfig,
    base_arrangement: Arrangement,
    budget: Budget,
    shorten_workload: Callable[[int], Workload | None],
) -> Arrangement:
    """Return the fastest arrangement that fits.

    ``base_arrangement`` has what is settled already: sharding and the VAE's first strategy.
    ``shorten_workload(n)`` returns the workload of the same video with n latent frames fewer, None if none
    are left. Raises InputError if nothing fits, with what would.
    """
    try:
        return _choose_for_all_stages(workload, memory, base_arrangement, budget, shorten_workload)
    except InputError as error:
        requested_settings = {
            key: value for key in _MEMORY_SETTINGS if (value := getattr(memory, key)) is not None
        }
        free_base = (
            base_arrangement if memory.vae is None else replace(base_arrangement, vae=WHOLE_VAE)
        )
        try:
            alternative = _choose_for_all_stages(
                workload,
                replace(memory, **dict.fromkeys(requested_settings)),
                free_base,
                budget,
                shorten_workload,
            )
        except InputError:
            raise error from None
        problem = str(error).partition("; ")[0]
        settings_text = " ".join(
            f"memory.{key}={value}" for key, value in requested_settings.items()
        )
        raise InputError(
            f"{problem}; without {settings_text} it fits, with the {alternative.description}"
        ) from None


def _choose_for_all_stages(
    workload: Workload,
    memory: MemoryConfig,
    base_arrangement: Arrangement,
    budget: Budget,
    shorten_workload: Callable[[int], Workload | None],
) -> Arrangement:
    text_placements = ["gpu"] if base_arrangement.shard_t5 else ["gpu", "stream"]
    if memory.t5:
        text_placements = [memory.t5]
    text_candidates = [replace(base_arrangement, t5=placement) for placement in text_placements]
    arrangement = _choose_first_fitting(
        workload, text_candidates, ("text",), budget, shorten_workload
    )
    arrangement = _choose_first_fitting(
        workload,
        [replace(arrangement, clip=placement) for placement in ("gpu", "cpu")],
        ("look",),
        budget,
        shorten_workload,
    )
    arrangement = _choose_first_fitting(
        workload,
        _list_transformer_choices(arrangement, memory, workload),
        ("context", "load", "denoise"),
        budget,
        shorten_workload,
    )
    return choose_vae_strategies(workload, memory, arrangement, budget, shorten_workload)


def choose_vae_strategies(
    workload: Workload,
    memory: MemoryConfig,
    base_arrangement: Arrangement,
    budget: Budget,
    shorten_workload: Callable[[int], Workload | None],
) -> Arrangement:
    """Return the arrangement with the first strategies of the VAE that fit, for decoding and for images.

    The search starts from the strategy in ``base_arrangement``. Raises InputError if none fits.
    """
    dims, itemsize = workload.model_dims.vae, workload.vae_itemsize
    free_bytes = (
        2**62
        if budget.gpu_bytes is None
        else budget.gpu_bytes - count_vae_weight_bytes(dims, itemsize)
    )

    def choose_first_strategy(name: str, *, encode: bool) -> VaeStrategy:
        latent_size = workload.get_vae_size(encode=encode)
        strategy = find_fitting_strategies(
            name,
            dims,
            latent_size,
            workload.num_ranks,
            free_bytes=free_bytes,
            itemsize=itemsize,
            encode=encode,
        )[0]
        is_overridden = memory.vae in ("whole", "parallel") and strategy.name != memory.vae
        return VaeStrategy(name) if is_overridden else strategy  # used as it is, or refused below

    arrangement = replace(
        base_arrangement,
        vae=choose_first_strategy(base_arrangement.vae.name, encode=False),
        image=choose_first_strategy(base_arrangement.vae.name, encode=True),
    )
    return _choose_first_fitting(
        workload, [arrangement], ("image", "decode"), budget, shorten_workload
    )


def list_fallbacks(
    arrangement: Arrangement, memory: MemoryConfig, *, can_split_passes: bool
) -> list[Arrangement]:
    """Return the fallbacks, in order, for a transformer that has run out of memory after all.

    What the user has set stays.
    """
    changes: list[dict[str, str | int]] = [
        {"slice_tokens": slice_length} for slice_length in (8192, 2048, 512)
    ]
    if can_split_passes:
        changes.insert(1, {"passes": "apart"})
    changes.insert(
        -1, {"dit": "disk"} if arrangement.dit == "disk" else {"dit": "stream", "shard_dit": False}
    )
    fallbacks, current = [], arrangement
    for change in changes:
        if any(getattr(memory, key, None) is not None for key in change):
            continue
        if (
            (slice_length := change.get("slice_tokens")) is not None
            and current.slice_tokens is not None
            and current.slice_tokens <= int(slice_length)
        ):
            continue
        if (fallback := replace(current, **change)) != current:  # type: ignore[arg-type]
            fallbacks.append(fallback)
            current = fallback
    return fallbacks


def replace_transformer_part(arrangement: Arrangement, source: Arrangement) -> Arrangement:
    """Return ``arrangement`` with the transformer's part of ``source``."""
    return replace(
        arrangement,
        dit=source.dit,
        gguf=source.gguf,
        shard_dit=source.shard_dit,
        slice_tokens=source.slice_tokens,
        passes=source.passes,
    )


def _list_transformer_choices(
    base_arrangement: Arrangement, memory: MemoryConfig, workload: Workload
) -> list[Arrangement]:
    """Return the possible arrangements of the transformer, fastest first; what the user has set stays."""
    can_split_passes = len(workload.text_lengths) > 1 and workload.cfg_degree == 1
    values_by_setting = {
        key: list(costs) if getattr(memory, key) is None else [getattr(memory, key)]
        for key, costs in _STEP_SLOWDOWN.items()
    }
    if workload.compressed_blocks is None and memory.gguf is None:
        values_by_setting["gguf"] = ["decoded"]
    if not can_split_passes:
        values_by_setting["passes"] = values_by_setting["passes"][:1]
    combinations = [
        dict(zip(values_by_setting, values, strict=True))
        for values in itertools.product(*values_by_setting.values())
    ]
    combinations.sort(key=partial(_estimate_slowdown, workload))
    return [
        replace(
            base_arrangement,
            **choice,
            shard_dit=base_arrangement.shard_dit and choice["dit"] == "resident",
        )
        for choice in combinations
    ]


def _estimate_slowdown(workload: Workload, choice: dict[str, Any]) -> float:
    """Return the approximate slowdown of a step by the settings of the transformer."""
    slowdown = sum(_STEP_SLOWDOWN[key].get(value, 0.0) for key, value in choice.items())
    compressed = workload.compressed_blocks
    if choice["gguf"] == "compressed" and compressed is not None and compressed.num_changed:
        slowdown += 0.03  # LoRAs are merged in each step, not once
    if choice["gguf"] == "decoded" and choice["dit"] == "disk":
        # GGUF is decoded, and LoRAs are merged, in each step; the result goes back to the host.
        slowdown += 0.1
    return slowdown


def _choose_first_fitting(
    workload: Workload,
    candidates: Sequence[Arrangement],
    stages: tuple[str, ...],
    budget: Budget,
    shorten_workload: Callable[[int], Workload | None],
) -> Arrangement:
    def find_short_stages(
        candidate: Arrangement, workload: Workload, scale: float
    ) -> list[tuple[StageMemory, list[str]]]:
        candidate_stages = (
            stage for stage in estimate_memory(workload, candidate) if stage.name in stages
        )
        return [
            (stage, shortages)
            for stage in candidate_stages
            if (shortages := budget.list_shortages(stage, workload.ranks_per_node, scale))
        ]

    for candidate in candidates:
        if not find_short_stages(candidate, workload, 1.0):
            return candidate
    # The last candidate takes the least memory. It is tried if the prediction may be too high by enough.
    leanest = candidates[-1]
    if not (short_stages := find_short_stages(leanest, workload, _PREDICTION_TOLERANCE)):
        return leanest
    stage, shortages = short_stages[0]
    suggestion = _suggest_fewer_frames(workload, leanest, find_short_stages, shorten_workload)
    raise InputError(
        f"stage {stage.name} needs {' and '.join(shortages)} "
        f"({leanest.description.replace('; ', ', ')}); {suggestion}"
    )


def _suggest_fewer_frames(
    workload: Workload,
    leanest: Arrangement,
    find_short_stages: Callable[
        [Arrangement, Workload, float], list[tuple[StageMemory, list[str]]]
    ],
    shorten_workload: Callable[[int], Workload | None],
) -> str:
    """Return in words the smallest cut of frames with which ``leanest`` would fit, or that none helps."""

    def can_fit_with_fewer(num_fewer_frames: int) -> bool:
        shorter_workload = shorten_workload(num_fewer_frames)
        return shorter_workload is not None and not find_short_stages(
            leanest, shorter_workload, 1.0
        )

    frame_reductions = range(1, workload.latent_shape[1])  # latent frames fewer
    reduction_index = bisect_left(frame_reductions, True, key=can_fit_with_fewer)
    if reduction_index < len(frame_reductions):
        num_latent_frames = (
            workload.get_vae_size(encode=False)[0] - frame_reductions[reduction_index]
        )
        return f"frame_num={4 * (num_latent_frames - 1) + 1} fits, or use a smaller size"
    return "fewer frames do not help; use a smaller size, or more memory"
