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
from wan_dist.output.host_memory import HostWatch, read_peak_host_bytes
from wan_dist.planning.digests import FORMAT
from wan_dist.planning.memory_estimate import Use
from wan_dist.runtime.atomic_write import written_aside
from wan_dist.runtime.log import logger

_PACKAGES = ("transformers", "safetensors", "hydra-core", "imageio-ffmpeg", "numpy")
_GIB = 2**30


class Report:
    """Collects the stages of one video. ``facts`` are further entries of the record; a quiet one logs nothing.

    ``host_gib`` is the most of the host's memory that the process had for itself during a stage; ``peak_host_gib`` is its largest
    resident set so far, which counts mapped pages of the weight files too, which the system takes back when it needs the memory.
    """

    def __init__(self, config: RunConfig, device: torch.device, *, quiet: bool = False) -> None:
        self.device = device
        self.level = logging.DEBUG if quiet else logging.INFO
        self.start = time.perf_counter()
        self._watch = HostWatch()
        self._peaks_of_open_stages: list[int] = []
        self.stages: dict[str, dict[str, float]] = {}
        self.other_ranks: list[dict[str, dict[str, float]]] = []
        """The stages of the video's other ranks, before it is decoded."""
        self.facts: dict[str, Any] = {
            "config": asdict(config),
            "versions": {"wan-dist": __version__, "python": platform.python_version(), "torch": torch.__version__}
            | {name: version(name) for name in _PACKAGES},
            "device": _device_name(device),
            "machine": socket.gethostname(),
            "began": round(time.time(), 3),
            "format": FORMAT,
        }

    @contextmanager
    def stage(self, name: str, detail: str = "", *, beside: bool = False) -> Iterator[None]:
        """Time a stage and log one line when it is done; stages may nest.

        Of one that goes on ``beside`` another video's, the GPU's memory is not noted: it counts as that of the other.
        """
        cuda = self.device.type == "cuda" and not beside
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device)  # the counter starts anew; an open stage keeps what it saw
            self._peaks_of_open_stages = [max(peak, seen) for seen in self._peaks_of_open_stages]
            torch.cuda.reset_peak_memory_stats(self.device)
        self._peaks_of_open_stages.append(0)
        start, began = time.perf_counter(), time.time()
        try:
            yield
        except BaseException as fault:
            fault.add_note(f"in stage {name}, after {time.perf_counter() - start:.0f} s")
            raise
        if cuda:
            torch.cuda.synchronize(self.device)
        peak_seen = self._peaks_of_open_stages.pop()
        entry = {"began": round(began, 3), "seconds": round(time.perf_counter() - start, 3)}
        entry["peak_host_gib"] = round(read_peak_host_bytes() / _GIB, 3)
        entry["host_gib"] = round(self._watch.peak_since(start) / _GIB, 3)
        if cuda:
            entry["peak_gpu_gib"] = round(max(peak_seen, torch.cuda.max_memory_allocated(self.device)) / _GIB, 3)
            entry["reserved_gpu_gib"] = round(torch.cuda.max_memory_reserved(self.device) / _GIB, 3)  # since the last stage began
            free, total = torch.cuda.mem_get_info(self.device)
            entry["outside_gpu_gib"] = round((total - free - torch.cuda.memory_reserved(self.device)) / _GIB, 3)  # driver, others
        self.stages[name] = entry
        memory = f", GPU peak {entry['peak_gpu_gib']:.1f} GiB" if cuda else ""
        logger.log(self.level, "%-9s %6.1f s%s%s", name, entry["seconds"], memory, f"  {detail}" if detail else "")

    def ran_out(self, name: str) -> None:
        """Note that a stage ran out of memory and was done in another way than planned."""
        self.facts.setdefault("ran_out", []).append(name)

    def rate(self, name: str, num_bytes: int) -> None:
        """Note and log how fast a stage that is done has read this rank's share of a file."""
        speed = num_bytes / 1e9 / max(self.stages[name]["seconds"], 1e-3)
        self.stages[name] |= {"read_gb": round(num_bytes / 1e9, 3), "gb_per_second": round(speed, 2)}
        logger.log(self.level, "read      %.1f GB at %.1f GB/s", num_bytes / 1e9, speed)

    def compare(self, uses: Sequence[Use], ranks_per_node: int) -> None:
        """Put the plan's GiB for one rank beside the measured peaks, of all ranks, in the record, and log the largest."""
        compared = {}
        for use in uses:
            ranks = [self.stages, *self.other_ranks]
            seen = [stage for stages in ranks for name, stage in stages.items() if name.split()[0] == use.stage]  # two experts load each
            if not seen:
                continue
            on_host = use.host_bytes / ranks_per_node + (0 if self.device.type == "cuda" else use.gpu_bytes)
            entry = {"planned_gpu_gib": use.gpu_bytes / _GIB, "planned_host_gib": on_host / _GIB}
            entry |= {key: max(stage[key] for stage in seen) for key in ("peak_gpu_gib", "reserved_gpu_gib", "host_gib") if key in seen[0]}
            compared[use.stage] = {key: round(value, 3) for key, value in entry.items()}
        self.facts["memory"] = compared
        key = "gpu" if self.device.type == "cuda" else "host"
        peak = "peak_gpu_gib" if key == "gpu" else "host_gib"
        if compared and all(peak in entry for entry in compared.values()):
            stage = max(compared, key=lambda name: compared[name][peak])
            found = compared[stage]
            planned = found[f"planned_{key}_gib"]
            logger.log(self.level, "memory    %.1f GiB of the %s at most, in %s; planned %.1f", found[peak], key, stage, planned)

    def save(self, path: Path) -> None:
        """Write the record."""
        peaks = {
            key: max((stage[key] for stage in self.stages.values() if key in stage), default=None)
            for key in ("peak_host_gib", "peak_gpu_gib")
        }
        seconds = round(time.perf_counter() - self.start, 3)
        record = self.facts | {"stages": self.stages, "other_ranks": self.other_ranks, "seconds": seconds} | peaks
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
