"""The memory that stages take, as a table; no torch."""

from collections.abc import Sequence

from wan_dist.planning.memory_estimate import Use
from wan_dist.planning.workload import GIB


def table(uses: Sequence[Use], gpu: int | None, host: int) -> list[str]:
    """Return a table of what stages take, in GiB, beside what there is."""
    lines = [f"{'GiB':9} {'GPU' if gpu is not None else 'tensors':>8}  of which{'':45} {'host':>6}"]
    for use in uses:
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in use.gpu.items() if size >= 0.05 * GIB)
        lines.append(f"{use.stage:9} {use.gpu_bytes / GIB:8.1f}  {parts:53} {use.host_bytes / GIB:6.1f}")
    room = f"{gpu / GIB:8.1f}" if gpu is not None else f"{'':8}"
    return [*lines, f"{'there is':9} {room}  {'':53} {host / GIB:6.1f}"]
