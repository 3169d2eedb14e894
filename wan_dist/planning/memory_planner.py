"""The fastest arrangement of a run that fits into the memory there is, or what would; no torch.

The stages of a run follow each other, so each is arranged on its own: text encoder, transformer, VAE.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wan_dist.config.schema import MemoryConfig
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_estimate import CONTEXT_BYTES, LATER_NCCL_BYTES, NCCL_BYTES, UNUSED_BYTES, Use, footprint
from wan_dist.planning.parameter_bytes import vae_weight_bytes
from wan_dist.planning.vae_memory import WHOLE, Way, ways_that_fit
from wan_dist.planning.workload import GIB, Arrangement, Load
from wan_dist.runtime.errors import InputError

_CHOICES = ("dit", "t5", "slice_tokens", "passes", "vae")
_SLOWDOWN: dict[str, dict[Any, float]] = {
    "dit": {"resident": 0.0, "stream": 0.03, "disk": 1.0},
    "passes": {"together": 0.0, "apart": 0.02},
    "slice_tokens": {None: 0.0, 8192: 0.01, 2048: 0.06, 512: 0.2},
}
"""How much slower a step is about, to put arrangements in order; estimates."""
_LENIENCE = 0.9
"""A prediction may be this much too high: what the user has asked for is refused only if it would not fit even then."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take."""

    gpu: int | None
    """Of each rank's GPU, for PyTorch's tensors; None: everything is on the host."""
    host: int
    """Of a node, for all its ranks."""
    host_limit: str = "free memory"

    def lacks(self, use: Use, ranks_per_node: int, scale: float = 1.0) -> list[str]:
        """Return what a stage would need more of, in words; nothing if it fits."""
        if self.gpu is None:
            on_gpu, on_host = 0, use.host_bytes + use.gpu_bytes * ranks_per_node
        else:
            on_gpu, on_host = use.gpu_bytes, use.host_bytes
        faults = []
        if self.gpu is not None and on_gpu * scale > self.gpu:
            faults.append(f"{on_gpu / GIB:.1f} GiB of GPU memory, of which {self.gpu / GIB:.1f} can be used")
        if on_host * scale > self.host:
            faults.append(f"{on_host / GIB:.1f} GiB of host memory, of which {self.host / GIB:.1f} can be used ({self.host_limit})")
        return faults


def budget_of(hardware: Hardware, memory: MemoryConfig, num_ranks: int = 1) -> Budget:
    """Return what may be taken of this hardware; the user's limits count where they are lower."""
    gpu = hardware.gpu_bytes
    if gpu is not None:
        gpu -= UNUSED_BYTES if hardware.has_context else CONTEXT_BYTES
        if num_ranks > 1:
            gpu -= LATER_NCCL_BYTES if hardware.has_context else NCCL_BYTES
        if memory.budget_gib is not None:
            gpu = min(gpu, int(memory.budget_gib * GIB))
    host, why = hardware.host_bytes, hardware.host_limit
    if memory.host_budget_gib is not None and memory.host_budget_gib * GIB < host:
        host, why = int(memory.host_budget_gib * GIB), "memory.host_budget_gib"
    return Budget(gpu, host, why)


def arrange(load: Load, memory: MemoryConfig, base: Arrangement, budget: Budget, shorter: Callable[[int], Load | None]) -> Arrangement:
    """Return the fastest arrangement that fits; ``base`` has what is settled already: sharding and the VAE's first way.

    ``shorter(n)`` gives the load of the same video with n latent frames less, None if there are none. Raises InputError if nothing
    fits, with what would.
    """
    try:
        return _arrange(load, memory, base, budget, shorter)
    except InputError as fault:
        given = {key: value for key in _CHOICES if (value := getattr(memory, key)) is not None}
        other_base = base if memory.vae is None else replace(base, vae=WHOLE)
        try:
            other = _arrange(load, replace(memory, **dict.fromkeys(given)), other_base, budget, shorter)
        except InputError:
            raise fault from None
        what = str(fault).partition("; ")[0]
        settings = " ".join(f"memory.{key}={value}" for key, value in given.items())
        raise InputError(f"{what}; without {settings} it would fit, with the {other.words}") from None


def _arrange(load: Load, memory: MemoryConfig, base: Arrangement, budget: Budget, shorter: Callable[[int], Load | None]) -> Arrangement:
    text = [replace(base, t5=place) for place in ([memory.t5] if memory.t5 else ["gpu"] if base.shard_t5 else ["gpu", "stream"])]
    chosen = _first_that_fits(load, text, ("text",), budget, shorter)
    chosen = _first_that_fits(load, [replace(chosen, clip=place) for place in ("gpu", "cpu")], ("look",), budget, shorter)
    chosen = _first_that_fits(load, _transformers(chosen, memory, load), ("context", "load", "denoise"), budget, shorter)
    return arrange_vae(load, memory, chosen, budget, shorter)


def arrange_vae(load: Load, memory: MemoryConfig, base: Arrangement, budget: Budget, shorter: Callable[[int], Load | None]) -> Arrangement:
    """Return the arrangement with the first ways of the VAE that fit, from that in ``base`` on. Raises InputError if none does."""
    dims, itemsize = load.models.vae, load.vae_itemsize
    free = 2**62 if budget.gpu is None else budget.gpu - vae_weight_bytes(dims, itemsize)

    def first(name: str, *, encode: bool) -> Way:
        size = load.vae_size(encode=encode)
        found = ways_that_fit(name, dims, size, load.num_ranks, free=free, itemsize=itemsize, encode=encode)[0]
        asked = memory.vae in ("whole", "parallel") and found.name != memory.vae
        return Way(name) if asked else found  # it is obeyed, or refused below

    found = replace(base, vae=first(base.vae.name, encode=False), image=first(base.vae.name, encode=True))
    return _first_that_fits(load, [found], ("image", "decode"), budget, shorter)


def rungs_below(taken: Arrangement, memory: MemoryConfig, *, can_part: bool) -> list[Arrangement]:
    """Return what to try where the transformer has run out of memory after all, in order; what the user has set stays."""
    steps: list[dict[str, str | int]] = [{"slice_tokens": length} for length in (8192, 2048, 512)]
    if can_part:
        steps.insert(1, {"passes": "apart"})
    steps.insert(-1, {"dit": "disk"} if taken.dit == "disk" else {"dit": "stream", "shard_dit": False})
    rungs, now = [], taken
    for step in steps:
        if any(getattr(memory, key, None) is not None for key in step):
            continue
        if (length := step.get("slice_tokens")) is not None and now.slice_tokens is not None and now.slice_tokens <= int(length):
            continue
        if (lower := replace(now, **step)) != now:  # type: ignore[arg-type]
            rungs.append(lower)
            now = lower
    return rungs


def with_transformer_of(arrangement: Arrangement, other: Arrangement) -> Arrangement:
    """Return an arrangement with what another one does with the transformer."""
    return replace(arrangement, dit=other.dit, shard_dit=other.shard_dit, slice_tokens=other.slice_tokens, passes=other.passes)


def _transformers(base: Arrangement, memory: MemoryConfig, load: Load) -> list[Arrangement]:
    """Return what can be done with the transformer, the fastest first; what the user has set stays."""
    can_part = len(load.text_tokens) > 1 and load.cfg == 1
    choices = {key: list(costs) if getattr(memory, key) is None else [getattr(memory, key)] for key, costs in _SLOWDOWN.items()}
    if not can_part:
        choices["passes"] = choices["passes"][:1]
    found = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    found.sort(key=lambda choice: sum(_SLOWDOWN[key].get(value, 0.0) for key, value in choice.items()))
    return [replace(base, **choice, shard_dit=base.shard_dit and choice["dit"] == "resident") for choice in found]


def _first_that_fits(
    load: Load, candidates: Sequence[Arrangement], stages: tuple[str, ...], budget: Budget, shorter: Callable[[int], Load | None]
) -> Arrangement:
    def lacks(candidate: Arrangement, load: Load, scale: float) -> list[tuple[Use, list[str]]]:
        uses = (use for use in footprint(load, candidate) if use.stage in stages)
        return [(use, faults) for use in uses if (faults := budget.lacks(use, load.ranks_per_node, scale))]

    for candidate in candidates:
        if not lacks(candidate, load, 1.0):
            return candidate
    # The last one takes the least. What was asked for is tried if the prediction may be wrong by enough.
    least = candidates[-1]
    if not (found := lacks(least, load, _LENIENCE)):
        return least
    use, faults = found[0]
    raise InputError(
        f"{use.stage} would need {' and '.join(faults)} ({least.words.replace('; ', ', ')}); {_change(load, least, lacks, shorter)}"
    )


def _change(
    load: Load,
    least: Arrangement,
    lacks: Callable[[Arrangement, Load, float], list[tuple[Use, list[str]]]],
    shorter: Callable[[int], Load | None],
) -> str:
    """Return the smallest change with which it would fit."""

    def fits(number: int) -> bool:
        other = shorter(number)
        return other is not None and not lacks(least, other, 1.0)

    numbers = range(1, load.latent_shape[1])  # of frames less
    fewest = bisect_left(numbers, True, key=fits)
    if fewest < len(numbers):
        return f"frame_num={4 * (load.latent_shape[1] - numbers[fewest] - 1) + 1} would fit, or a smaller size"
    return "fewer frames would not help; a smaller size or more memory would"
