"""Memory table: the predicted memory of each stage, as text; no torch."""

from collections.abc import Sequence

from wan_dist.planning.memory_estimate import StageMemory
from wan_dist.planning.workload import GIB


def format_memory_table(
    stages: Sequence[StageMemory], gpu_bytes: int | None, host_bytes: int
) -> list[str]:
    """Return the lines of a table of the memory of stages, in GiB; the last line is the available memory."""
    lines = [
        f"{'GiB':9} {'GPU' if gpu_bytes is not None else 'tensors':>8}  of which{'':45} {'host':>6}"
    ]
    for stage in stages:
        parts = ", ".join(
            f"{part} {num_bytes / GIB:.1f}"
            for part, num_bytes in stage.gpu_parts.items()
            if num_bytes >= 0.05 * GIB
        )
        lines.append(
            f"{stage.name:9} {stage.gpu_bytes / GIB:8.1f}  {parts:53} {stage.host_bytes / GIB:6.1f}"
        )
    gpu_text = f"{gpu_bytes / GIB:8.1f}" if gpu_bytes is not None else f"{'':8}"
    return [*lines, f"{'available':9} {gpu_text}  {'':53} {host_bytes / GIB:6.1f}"]
