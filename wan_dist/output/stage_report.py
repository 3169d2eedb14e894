"""What a run cost: seconds and peak memory of each stage, logged as it goes and kept in a JSON record beside the video."""

import json
import logging
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wan_dist import __version__
from wan_dist.config.schema import RunConfig
from wan_dist.output.host_memory import HostMemoryWatch, read_peak_host_bytes
from wan_dist.planning.digests import FORMAT_VERSION
from wan_dist.planning.memory_estimate import StageMemory
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.log import logger

_RECORDED_PACKAGES = ("transformers", "safetensors", "hydra-core", "imageio-ffmpeg", "numpy")
_GIB = 2**30


class StageReport:
    """Collects the stages of one video. ``facts`` are further entries of the record; a quiet one logs nothing.

    ``host_gib`` is the most of the host's memory that the process had for itself during a stage; ``peak_host_gib`` is its largest
    resident set so far, which counts mapped pages of the weight files too, which the system takes back when it needs the memory.
    """

    def __init__(self, config: RunConfig, device: torch.device, *, quiet: bool = False) -> None:
        self.device = device
        self.log_level = logging.DEBUG if quiet else logging.INFO
        self.start_time = time.perf_counter()
        self._memory_watch = HostMemoryWatch()
        self._open_stage_peak_bytes: list[int] = []
        self.stages: dict[str, dict[str, float]] = {}
        self.other_rank_stages: list[dict[str, dict[str, float]]] = []
        """The stages of the video's other ranks, before it is decoded."""
        self.metadata: dict[str, Any] = {
            "config": asdict(config),
            "versions": {
                "wan-dist": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            | {name: version(name) for name in _RECORDED_PACKAGES},
            "device": _get_device_name(device),
            "machine": socket.gethostname(),
            "began": round(time.time(), 3),
            "format": FORMAT_VERSION,
        }

    @contextmanager
    def measure_stage(
        self, name: str, detail: str = "", *, is_concurrent: bool = False
    ) -> Iterator[None]:
        """Time a stage and log one line when it is done; stages may nest.

        Of one that goes on ``beside`` another video's, the GPU's memory is not noted: it counts as that of the other.
        """
        measures_gpu = self.device.type == "cuda" and not is_concurrent
        if measures_gpu:
            peak_bytes = torch.cuda.max_memory_allocated(
                self.device
            )  # the counter starts anew; an open stage keeps what it saw
            self._open_stage_peak_bytes = [
                max(peak_bytes, open_peak_bytes) for open_peak_bytes in self._open_stage_peak_bytes
            ]
            torch.cuda.reset_peak_memory_stats(self.device)
        self._open_stage_peak_bytes.append(0)
        start, wall_start_time = time.perf_counter(), time.time()
        try:
            yield
        except BaseException as error:
            error.add_note(f"in stage {name}, after {time.perf_counter() - start:.0f} s")
            raise
        if measures_gpu:
            torch.cuda.synchronize(self.device)
        stage_peak_bytes = self._open_stage_peak_bytes.pop()
        measurements = {
            "began": round(wall_start_time, 3),
            "seconds": round(time.perf_counter() - start, 3),
        }
        measurements["peak_host_gib"] = round(read_peak_host_bytes() / _GIB, 3)
        measurements["host_gib"] = round(self._memory_watch.get_peak_since(start) / _GIB, 3)
        if measures_gpu:
            measurements["peak_gpu_gib"] = round(
                max(stage_peak_bytes, torch.cuda.max_memory_allocated(self.device)) / _GIB, 3
            )
            measurements["reserved_gpu_gib"] = round(
                torch.cuda.max_memory_reserved(self.device) / _GIB, 3
            )  # since the last stage began
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            measurements["outside_gpu_gib"] = round(
                (total_bytes - free_bytes - torch.cuda.memory_reserved(self.device)) / _GIB, 3
            )  # driver, others
        self.stages[name] = measurements
        memory_text = f", GPU peak {measurements['peak_gpu_gib']:.1f} GiB" if measures_gpu else ""
        logger.log(
            self.log_level,
            "%-9s %6.1f s%s%s",
            name,
            measurements["seconds"],
            memory_text,
            f"  {detail}" if detail else "",
        )

    def record_out_of_memory(self, name: str) -> None:
        """Note that a stage ran out of memory and was done in another way than planned."""
        self.metadata.setdefault("ran_out", []).append(name)

    def record_read_speed(self, name: str, num_bytes: int) -> None:
        """Note and log how fast a stage that is done has read this rank's share of a file."""
        gb_per_second = num_bytes / 1e9 / max(self.stages[name]["seconds"], 1e-3)
        self.stages[name] |= {
            "read_gb": round(num_bytes / 1e9, 3),
            "gb_per_second": round(gb_per_second, 2),
        }
        logger.log(self.log_level, "read      %.1f GB at %.1f GB/s", num_bytes / 1e9, gb_per_second)

    def compare_memory(self, stage_memories: Sequence[StageMemory], ranks_per_node: int) -> None:
        """Put the plan's GiB for one rank beside the measured peaks, of all ranks, in the record, and log the largest."""
        comparison_by_stage = {}
        for stage_memory in stage_memories:
            stages_by_rank = [self.stages, *self.other_rank_stages]
            measured_stages = [
                stage
                for stages in stages_by_rank
                for name, stage in stages.items()
                if name.split()[0] == stage_memory.name
            ]  # two experts load each
            if not measured_stages:
                continue
            planned_host_bytes = stage_memory.host_bytes / ranks_per_node + (
                0 if self.device.type == "cuda" else stage_memory.gpu_bytes
            )
            comparison = {
                "planned_gpu_gib": stage_memory.gpu_bytes / _GIB,
                "planned_host_gib": planned_host_bytes / _GIB,
            }
            comparison |= {
                key: max(stage[key] for stage in measured_stages)
                for key in ("peak_gpu_gib", "reserved_gpu_gib", "host_gib")
                if key in measured_stages[0]
            }
            comparison_by_stage[stage_memory.name] = {
                key: round(value, 3) for key, value in comparison.items()
            }
        self.metadata["memory"] = comparison_by_stage
        key = "gpu" if self.device.type == "cuda" else "host"
        peak_key = "peak_gpu_gib" if key == "gpu" else "host_gib"
        if comparison_by_stage and all(
            peak_key in comparison for comparison in comparison_by_stage.values()
        ):
            stage = max(comparison_by_stage, key=lambda name: comparison_by_stage[name][peak_key])
            largest_comparison = comparison_by_stage[stage]
            planned_gib = largest_comparison[f"planned_{key}_gib"]
            logger.log(
                self.log_level,
                "memory    %.1f GiB of the %s at most, in %s; planned %.1f",
                largest_comparison[peak_key],
                key,
                stage,
                planned_gib,
            )

    def save(self, path: Path) -> None:
        """Write the record."""
        peaks = {
            key: max((stage[key] for stage in self.stages.values() if key in stage), default=None)
            for key in ("peak_host_gib", "peak_gpu_gib")
        }
        seconds = round(time.perf_counter() - self.start_time, 3)
        record = (
            self.metadata
            | {"stages": self.stages, "other_ranks": self.other_rank_stages, "seconds": seconds}
            | peaks
        )
        with atomic_write(path) as temporary_file:
            temporary_file.write_text(
                json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def _get_device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
