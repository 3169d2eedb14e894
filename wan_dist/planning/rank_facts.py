"""Rank consistency check before planning: same settings, same files, one GPU for each rank; no torch."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wan_dist.config.checks import FILE_LIST_KEYS, split_files
from wan_dist.config.settings import SettingValues
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_file
from wan_dist.tasks.input_files import list_input_files

_FILE_KEYS = ("jobs", "camera", "latents")
"""Settings that name a file, beside those of input files."""


@dataclass(frozen=True)
class RankFacts:
    """Facts of one rank, which all ranks exchange before they plan."""

    settings: dict[str, object]
    """Values of the settings by dotted key."""
    files: dict[str, str]
    """Digests of the files that settings name, where this rank sees them."""
    gpu: str | None = None
    """What identifies its GPU among those of its host; None on a CPU."""
    gpu_bytes: int | None = None
    host: str = field(default_factory=socket.gethostname)


def collect_rank_facts(
    settings: SettingValues, gpu: str | None, gpu_bytes: int | None
) -> RankFacts:
    """Return this rank's facts; a file that it does not see, or cannot read, is left out.

    ``settings``: see `read_all_settings`.
    """
    file_digests = {}
    for key, value in _list_files(settings).items():
        paths = split_files(value) if key in FILE_LIST_KEYS else [Path(value).expanduser()]
        with suppress(OSError):  # planning says what is wrong with it
            if all(path.is_file() for path in paths):
                file_digests[key] = " ".join(map(hash_file, paths))
    return RankFacts(dict(settings), file_digests, gpu, gpu_bytes)


def _list_files(settings: SettingValues) -> dict[str, str]:
    """Return the files that the settings name, by setting."""
    files = {key: file for key in _FILE_KEYS if (file := settings.get(key)) is not None}
    return files | list_input_files(settings)


def check_ranks_match(facts_by_rank: Sequence[RankFacts]) -> int | None:
    """Return the least memory of the ranks' GPUs in bytes, None on CPUs.

    Raises InputError for ranks that cannot work together, the same error on all of them.
    """
    first_facts = facts_by_rank[0]
    first_files = _list_files(first_facts.settings)
    for rank, other_facts in enumerate(facts_by_rank):
        for key, value in first_facts.settings.items():
            if other_facts.settings.get(key) != value:
                mismatch = (
                    f"{value} on rank 0 and {other_facts.settings.get(key)} on rank {rank} "
                    f"({other_facts.host})"
                )
                raise InputError(f"{key} is {mismatch}; give all ranks the same settings")
        for key in first_facts.files.keys() & other_facts.files.keys():
            if first_facts.files[key] != other_facts.files[key]:
                raise InputError(
                    f"{key}={first_files[key]} differs between rank {rank} ({other_facts.host}) "
                    f"and rank 0 ({first_facts.host}); "
                    "use one file on a shared file system"
                )
        if (first_facts.gpu is None) != (other_facts.gpu is None):
            rank_without_gpu, rank_with_gpu = (0, rank) if first_facts.gpu is None else (rank, 0)
            raise InputError(
                f"rank {rank_without_gpu} on {facts_by_rank[rank_without_gpu].host} has no GPU, "
                f"and rank {rank_with_gpu} on {facts_by_rank[rank_with_gpu].host} has; "
                "device=cpu runs on the CPU everywhere"
            )
        same_gpu_ranks = [
            earlier_rank
            for earlier_rank in range(rank)
            if other_facts.gpu is not None
            and (facts_by_rank[earlier_rank].host, facts_by_rank[earlier_rank].gpu)
            == (other_facts.host, other_facts.gpu)
        ]
        if same_gpu_ranks:
            raise InputError(
                f"ranks {same_gpu_ranks[0]} and {rank} on {other_facts.host} use the same GPU "
                f"({other_facts.gpu}); start one rank for each GPU, and leave "
                "CUDA_VISIBLE_DEVICES to the launcher"
            )
    return (
        None
        if first_facts.gpu_bytes is None
        else min(other_facts.gpu_bytes or 0 for other_facts in facts_by_rank)
    )
