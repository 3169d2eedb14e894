"""What ranks tell each other before they plan: their settings, the files that these name, and their GPUs; no torch."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.config.schema import RunConfig
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_file

_FILES = ("jobs", "image", "first_frame", "last_frame", "latents")


@dataclass(frozen=True)
class RankFacts:
    """Of one rank."""

    settings: dict[str, object]
    """By dotted key."""
    files: dict[str, str]
    """Digests of the files that settings name, where this rank sees them."""
    gpu: str | None = None
    """What tells its GPU from others of its host; None on a CPU."""
    gpu_bytes: int | None = None
    host: str = field(default_factory=socket.gethostname)


def find_facts(config: RunConfig, gpu: str | None, gpu_bytes: int | None) -> RankFacts:
    """Return this rank's facts; a file that it does not see, or cannot read, is no fact."""
    files = {}
    for key in _FILES:
        if (name := getattr(config, key)) is None:
            continue
        with suppress(OSError):  # planning says what is wrong with it
            if (path := Path(name).expanduser()).is_file():
                files[key] = hash_file(path)
    return RankFacts(_flat(asdict(config)), files, gpu, gpu_bytes)


def check_alike(facts: Sequence[RankFacts]) -> int | None:
    """Return the least memory of the ranks' GPUs, None on CPUs; raises InputError for ranks that cannot work together, the same on all."""
    first = facts[0]
    for rank, other in enumerate(facts):
        for key, value in first.settings.items():
            if other.settings.get(key) != value:
                values = f"{value} on rank 0 and {other.settings.get(key)} on rank {rank} ({other.host})"
                raise InputError(f"{key} is {values}; give all ranks the same settings")
        for key in first.files.keys() & other.files.keys():
            if first.files[key] != other.files[key]:
                raise InputError(
                    f"{key}={first.settings[key]} is another file on rank {rank} ({other.host}) than on rank 0 ({first.host}); "
                    "give all nodes the same, on a file system that they share"
                )
        if (first.gpu is None) != (other.gpu is None):
            without, with_gpu = (0, rank) if first.gpu is None else (rank, 0)
            raise InputError(
                f"rank {without} on {facts[without].host} has no GPU, and rank {with_gpu} on {facts[with_gpu].host} has; "
                "device=cpu runs on the CPU everywhere"
            )
        same = [
            number for number in range(rank) if other.gpu is not None and (facts[number].host, facts[number].gpu) == (other.host, other.gpu)
        ]
        if same:
            raise InputError(
                f"ranks {same[0]} and {rank} on {other.host} have the same GPU ({other.gpu}); start one rank for each GPU, and leave "
                "CUDA_VISIBLE_DEVICES to the launcher"
            )
    return None if first.gpu_bytes is None else min(other.gpu_bytes or 0 for other in facts)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
