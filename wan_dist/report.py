"""What a run cost: seconds and peak memory of each stage, logged as it goes and kept in a JSON record beside the video."""

import json
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wan_dist import __version__
from wan_dist.config import RunConfig
from wan_dist.log import logger

_PACKAGES = ("transformers", "safetensors", "hydra-core", "imageio-ffmpeg", "numpy")
_GIB = 2**30


class Report:
    """Collects the stages of one run. ``facts`` are further entries of the record.

    ``peak_host_gib`` is the process's largest resident set so far; it counts mapped pages of the weight files, which the system
    takes back when it needs the memory.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self._peaks_of_open_stages: list[int] = []
        self.stages: dict[str, dict[str, float]] = {}
        self.facts: dict[str, Any] = {
            "config": asdict(config),
            "versions": {"wan-dist": __version__, "python": platform.python_version(), "torch": torch.__version__}
            | {name: version(name) for name in _PACKAGES},
            "device": _device_name(device),
        }

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """Time a stage and log one line when it is done; stages may nest."""
        cuda = self.device.type == "cuda"
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device)  # the counter starts anew; an open stage keeps what it saw
            self._peaks_of_open_stages = [max(peak, seen) for seen in self._peaks_of_open_stages]
            torch.cuda.reset_peak_memory_stats(self.device)
        self._peaks_of_open_stages.append(0)
        start = time.perf_counter()
        try:
            yield
        except BaseException as fault:
            fault.add_note(f"in stage {name}, after {time.perf_counter() - start:.0f} s")
            raise
        if cuda:
            torch.cuda.synchronize(self.device)
        peak_seen = self._peaks_of_open_stages.pop()
        entry = {"seconds": round(time.perf_counter() - start, 3), "peak_host_gib": round(_peak_host_bytes() / _GIB, 3)}
        if cuda:
            entry["peak_gpu_gib"] = round(max(peak_seen, torch.cuda.max_memory_allocated(self.device)) / _GIB, 3)
        self.stages[name] = entry
        memory = f", GPU peak {entry['peak_gpu_gib']:.1f} GiB" if cuda else ""
        logger.info("%-9s %6.1f s%s%s", name, entry["seconds"], memory, f"  {detail}" if detail else "")

    def rate(self, name: str, num_bytes: int) -> None:
        """Note and log how fast a stage that is done has read this rank's share of a file."""
        speed = num_bytes / 1e9 / max(self.stages[name]["seconds"], 1e-3)
        self.stages[name] |= {"read_gb": round(num_bytes / 1e9, 3), "gb_per_second": round(speed, 2)}
        logger.info("read      %.1f GB at %.1f GB/s", num_bytes / 1e9, speed)

    def save(self, path: Path) -> None:
        """Write the record."""
        peaks = {
            key: max((stage[key] for stage in self.stages.values() if key in stage), default=None)
            for key in ("peak_host_gib", "peak_gpu_gib")
        }
        seconds = round(time.perf_counter() - self.start, 3)
        record = self.facts | {"stages": self.stages, "seconds": seconds} | peaks
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
