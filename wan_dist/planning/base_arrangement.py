"""Base arrangement: sharding and the VAE's first strategy, which do not depend on memory; no torch."""

from wan_dist.config.sections import FsdpConfig, MemoryConfig
from wan_dist.planning.degrees import MIN_STRIP_PIXELS, Degrees
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.planning.workload import Arrangement
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task


def check_placements(
    memory: MemoryConfig, quant: str, degrees: Degrees, *, is_guided: bool
) -> None:
    """Raise InputError for settings of ``memory`` that contradict the quantisation or the guidance."""
    if quant != "none" and memory.dit == "disk":
        raise InputError(
            f"quant={quant} and memory.dit=disk cannot be combined: "
            "the weights would be quantised again in each step; use memory.dit=stream"
        )
    if quant != "none" and memory.gguf == "compressed":
        raise InputError(
            f"quant={quant} and memory.gguf=compressed cannot be combined: "
            "weights are either quantised anew or kept as the file has them; leave one of them out"
        )
    passes = memory.passes
    if passes == "together" and (degrees.cfg == 2 or not is_guided):
        reason = "with parallel.cfg=2 each rank has one" if degrees.cfg == 2 else "guidance is off"
        raise InputError(
            f"memory.passes={passes} needs both guidance passes on a rank, but {reason}; leave it out"
        )


def build_base_arrangement(
    memory: MemoryConfig, fsdp: FsdpConfig, task: Task, degrees: Degrees, latent_side: int
) -> Arrangement:
    """Return what does not depend on memory: whether weights are sharded, and the VAE's first strategy.

    ``latent_side``: the larger of the latents' height and width. Raises InputError for settings of ``memory``
    and ``fsdp`` that contradict each other or the degrees.
    """
    is_large = task.transformer_dims.blocks_gib > 12
    return Arrangement(
        shard_dit=_decide_sharding("dit", fsdp.dit, memory.dit, degrees, default=is_large),
        shard_t5=_decide_sharding("t5", fsdp.t5, memory.t5, degrees, default=False),
        vae=_choose_vae_strategy(memory.vae, degrees, latent_side),
    )


def _decide_sharding(
    model_key: str,
    requested: bool | None,
    placement: str | None,
    degrees: Degrees,
    *,
    default: bool,
) -> bool:
    """Return whether a model's weights are sharded: as ``requested``, or by default if that is None.

    With one rank, or where the model is not on the GPUs, they are not.
    """
    is_elsewhere = placement not in (None, "resident", "gpu")
    if requested and is_elsewhere:
        raise InputError(
            f"fsdp.{model_key}=true and memory.{model_key}={placement} cannot be combined: "
            "shards stay on the GPUs; leave one of them out"
        )
    if requested and degrees.ranks_per_replica == 1:
        raise InputError(
            f"fsdp.{model_key}=true needs several ranks to shard over, but there is one; "
            "leave it out, or start with torchrun"
        )
    return (
        degrees.ranks_per_replica > 1
        and not is_elsewhere
        and (default if requested is None else requested)
    )


def _choose_vae_strategy(requested: str | None, degrees: Degrees, latent_side: int) -> VaeStrategy:
    """Return the VAE's first strategy; ranks split the latents' larger side, ``latent_side``."""
    num_ranks = degrees.ranks_per_replica
    can_split = num_ranks > 1 and latent_side >= MIN_STRIP_PIXELS * num_ranks
    if requested == "parallel" and not can_split:
        reason = (
            "there is one rank"
            if num_ranks == 1
            else f"{latent_side} latent pixels are too few for {num_ranks} ranks"
        )
        raise InputError(f"memory.vae=parallel cannot be used: {reason}; use memory.vae=whole")
    return VaeStrategy(requested or ("parallel" if can_split else "whole"))
