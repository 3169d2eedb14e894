"""Parallelism strategies, applied to a transformer in the order that they need."""

from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.parallel.driving import apply_driving
from wan_dist.parallel.fsdp import apply_fsdp
from wan_dist.parallel.mesh import ProcessGroups
from wan_dist.parallel.ring import apply_ring
from wan_dist.parallel.sequence import apply_sequence_split
from wan_dist.parallel.ulysses import apply_ulysses
from wan_dist.parallel.usp import apply_usp


def parallelize_transformer(
    model: FusedTransformer,
    groups: ProcessGroups,
    *,
    is_sharded: bool,
    usp: str = "plain",
    is_driven: bool = False,
) -> None:
    """Parallelize a transformer that is still on the meta device.

    The order is sequence split, attention, then weight sharding (``is_sharded``). ``usp`` is the
    implementation of sequence-parallel attention: plain, or xfuser, which cannot be driven by a video.
    """
    sequence = apply_sequence_split(model, groups.sp) if groups.sp.size > 1 else None
    if sequence is not None and usp == "xfuser":
        apply_usp(model, groups)
    elif sequence is not None:
        apply_ring(model, sequence, groups.ring, ulysses_size=groups.ulysses.size)
    if is_driven:
        apply_driving(model, groups.sp, groups.ring, ulysses_size=groups.ulysses.size)
    if sequence is not None and usp != "xfuser":
        apply_ulysses(model, sequence, groups.ulysses)
    if is_sharded and groups.replica_mesh is not None:
        apply_fsdp(model, model.layers().values(), groups.replica_mesh)
