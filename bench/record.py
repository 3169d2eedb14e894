"""Benchmark results: rows, each with its run, and of each run the machine, versions, commit and date.

Rows of one run were measured on one machine, one after the other. A row that is measured again replaces the
older one.
"""

import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

PACKAGES = ("triton", "flash-attn-4", "diffusers", "torchao", "xfuser")


def this_run() -> dict[str, object]:
    """Return the GPU, number of GPUs, versions, commit and date of this process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    commit = os.environ.get("WAN_DIST_COMMIT") or found.stdout.strip() or "unknown"
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "gpu": gpu,
        "gpus": gpus,
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


class Record:
    """A file of rows; a row replaces an earlier one with the same values for ``keys``."""

    def __init__(self, file: Path, keys: Sequence[str]) -> None:
        self.file = file
        self.keys = keys
        kept = json.loads(file.read_text()) if file.exists() else {"runs": [], "rows": []}
        self.runs: list[dict[str, object]] = [*kept["runs"], this_run()]
        self.rows: list[dict[str, object]] = kept["rows"]

    def add(self, row: Mapping[str, object]) -> None:
        """Add a row and write the file."""
        self.rows = [other for other in self.rows if self._key(other) != self._key(row)]
        self.rows.append({**row, "run": len(self.runs)})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=2) + "\n")

    def _key(self, row: Mapping[str, object]) -> tuple[object, ...]:
        return tuple(row.get(key) for key in self.keys)
