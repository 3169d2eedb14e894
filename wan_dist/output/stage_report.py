"""Stage report: seconds and peak memory of each stage, logged and saved in a JSON record beside the video."""

import copy
import logging
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from wan_dist import __version__
from wan_dist.output.host_memory import HostMemoryWatch, read_peak_host_bytes
from wan_dist.output.record import Stages, VideoRecord
from wan_dist.planning.digests import FORMAT_VERSION
from wan_dist.planning.memory_estimate import StageMemory
from wan_dist.runtime.log import logger

_RECORDED_PACKAGES = ("transformers", "safetensors", "hydra-core", "imageio-ffmpeg", "numpy")
_GIB = 2**30
_MIN_LOGGED = 0.05
"""Seconds, GB or GiB; less would be printed as 0.0, which says nothing."""


class StageReport:
    """Collects the stages of one video.

    ``settings`` are all settings, in sections, for the record. ``record`` has the fields so far, without the
    stages; a ``quiet`` report logs at level DEBUG only.

    ``host_gib`` of a stage is the peak of the process's private host memory during it. ``peak_host_gib`` is
    the peak resident set of the process so far. It includes mapped pages of the weight files, which the
    system reclaims when it needs the memory.
    """

    def __init__(
        self, settings: dict[str, Any], device: torch.device, *, quiet: bool = False
    ) -> None:
        self.device = device
        self.log_level = logging.DEBUG if quiet else logging.INFO
        self.start_time = time.perf_counter()
        self._memory_watch = HostMemoryWatch()
        self._open_stage_peak_bytes: list[int] = []
        self._clip_suffix = ""
        self.stages: Stages = {}
        self.other_rank_stages: list[Stages] = []
        """Stages of the video's other ranks, before it is decoded."""
        self.record = VideoRecord()
        self.record.config = settings
        self.record.versions = {
            "wan-dist": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        } | {name: version(name) for name in _RECORDED_PACKAGES}
        self.record.device = _get_device_name(device)
        self.record.machine = socket.gethostname()
        self.began = self.record.began = round(time.time(), 3)
        """Seconds since the epoch."""
        self.record.format = FORMAT_VERSION

    def for_clip(self, number: int) -> Self:
        """Return the report for a further clip, whose stages have its number in their names."""
        report = copy.copy(self)
        report._clip_suffix = f" clip{number}"
        return report

    @contextmanager
    def measure_stage(
        self, name: str, detail: str = "", *, is_concurrent: bool = False
    ) -> Iterator[None]:
        """Time a stage and log one line when it is done; stages may nest.

        A stage that fails is not recorded, and its GPU peak counts for the stages around it. Of one that is
        ``is_concurrent`` with another video's stages, GPU memory is not recorded: it counts as theirs.
        """
        name += self._clip_suffix
        measures_gpu = self.device.type == "cuda" and not is_concurrent
        if measures_gpu:
            self._restart_gpu_peak()
        self._open_stage_peak_bytes.append(0)
        start, wall_start_time = time.perf_counter(), time.time()
        try:
            yield
        except BaseException as error:
            error.add_note(f"in stage {name}, after {time.perf_counter() - start:.0f} s")
            raise
        finally:
            earlier_peak_bytes = self._open_stage_peak_bytes.pop()
        if measures_gpu:
            torch.cuda.synchronize(self.device)
        measurements = {
            "began": round(wall_start_time, 3),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_host_gib": round(read_peak_host_bytes() / _GIB, 3),
            "host_gib": round(self._memory_watch.get_peak_since(start) / _GIB, 3),
        }
        if measures_gpu:
            measurements |= self._measure_gpu_memory(earlier_peak_bytes)
        self.stages[name] = measurements
        self._log_stage(name, measurements, detail)

    def _log_stage(self, name: str, measurements: dict[str, float], detail: str) -> None:
        """Log a line in columns: name, seconds, peak of a GPU's memory, detail; no zeros."""
        seconds, peak_gib = measurements["seconds"], measurements.get("peak_gpu_gib", 0.0)
        has_peak = peak_gib >= _MIN_LOGGED
        if seconds < _MIN_LOGGED and not has_peak:
            return
        memory_text = f"  GPU {peak_gib:5.1f} GiB" if has_peak else ""
        if self.device.type == "cuda":
            memory_text = f"{memory_text:15}"
        width = min(6, max(15 - len(name), 0))  # a long name takes some of the column of seconds
        text = f"{name:9} {seconds:{width}.1f} s{memory_text}  {detail}"
        logger.log(self.log_level, "%s", text.rstrip())

    def _restart_gpu_peak(self) -> None:
        """Reset CUDA's peak counter for a new stage; the stages that are open keep the peak so far."""
        peak_bytes = torch.cuda.max_memory_allocated(self.device)
        self._open_stage_peak_bytes = [
            max(peak_bytes, open_peak_bytes) for open_peak_bytes in self._open_stage_peak_bytes
        ]
        torch.cuda.reset_peak_memory_stats(self.device)

    def _measure_gpu_memory(self, earlier_peak_bytes: int) -> dict[str, float]:
        """Return the GPU memory of a stage, in GiB.

        ``earlier_peak_bytes`` is the stage's peak before its last inner stage started.
        """
        peak_bytes = max(earlier_peak_bytes, torch.cuda.max_memory_allocated(self.device))
        # reserved since the last stage began, as the counter has been reset then
        reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        # outside PyTorch's allocator: the driver, NCCL, other processes
        outside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(self.device)
        return {
            "peak_gpu_gib": round(peak_bytes / _GIB, 3),
            "reserved_gpu_gib": round(reserved_bytes / _GIB, 3),
            "outside_gpu_gib": round(outside_bytes / _GIB, 3),
        }

    def sum_seconds(self, name: str) -> float:
        """Return the seconds of a stage in all clips."""
        return sum(
            stage["seconds"]
            for stage_name, stage in self.stages.items()
            if stage_name.split()[0] == name
        )

    def record_out_of_memory(self, name: str) -> None:
        """Record that a stage ran out of memory and used a fallback."""
        self.record.ran_out = [*(self.record.ran_out or ()), name]

    def record_read_speed(self, name: str, num_bytes: int) -> None:
        """Record and log how fast a finished stage has read this rank's shard of a file."""
        stage = self.stages[name + self._clip_suffix]
        gb_per_second = num_bytes / 1e9 / max(stage["seconds"], 1e-3)
        stage |= {
            "read_gb": round(num_bytes / 1e9, 3),
            "gb_per_second": round(gb_per_second, 2),
        }
        if stage["read_gb"] >= _MIN_LOGGED:
            logger.log(
                self.log_level, "read      %.1f GB at %.1f GB/s", num_bytes / 1e9, gb_per_second
            )

    def compare_memory(self, stage_memories: Sequence[StageMemory], ranks_per_node: int) -> None:
        """Record a rank's planned GiB beside the measured peaks over all ranks, and log the largest.

        A planned stage is compared with all measured ones whose name begins with its name: two experts are
        loaded in two stages.
        """
        comparison_by_stage = {}
        for stage_memory in stage_memories:
            stages_by_rank = [self.stages, *self.other_rank_stages]
            measured_stages = [
                stage
                for stages in stages_by_rank
                for name, stage in stages.items()
                if name.split()[0] == stage_memory.name
            ]
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
        self.record.memory = comparison_by_stage
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
                "memory    peak %.1f GiB of the %s, in %s; planned %.1f",
                largest_comparison[peak_key],
                key,
                stage,
                planned_gib,
            )

    def save(self, path: Path) -> None:
        """Write the record, with the stages."""
        self.build_record().write(path)

    def build_record(self) -> VideoRecord:
        """Return a copy of the record with the stages, their sum and their peaks."""
        record = copy.copy(self.record)
        record.stages = self.stages
        record.other_ranks = self.other_rank_stages
        record.seconds = round(time.perf_counter() - self.start_time, 3)
        record.peak_host_gib = self._find_peak("peak_host_gib")
        record.peak_gpu_gib = self._find_peak("peak_gpu_gib")
        return record

    def _find_peak(self, key: str) -> float | None:
        return max((stage[key] for stage in self.stages.values() if key in stage), default=None)


def _get_device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
