"""Environment variables of a launcher: which rank this process is, of how many, checked here and nowhere else; no torch.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `launcher.adopt_slurm` translates srun's.
A set of which a part is missing is refused: a rank that guesses the rest would wait for others that never come. A variable that is
set to nothing, as .env and compose files leave it, counts as not set.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from wan_dist.runtime.errors import InputError

PLACE_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS_KEYS = ("MASTER_ADDR", "MASTER_PORT")
_REQUIRED_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *ADDRESS_KEYS)
_LARGEST_PORT = 65535
_WAY_OUT = f"start ranks with torchrun or srun, which set all of them, or run alone: unset {' '.join(PLACE_KEYS)}"

_WITHOUT_NOTHING = (*PLACE_KEYS, *ADDRESS_KEYS, "HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""And those of the Hugging Face libraries: what means nothing to us means an empty name or number to libraries."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those of a run: its rank, how many there are, and the same on its node."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1


def text_of(key: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a variable's value without surrounding blanks; an empty string where it is not set."""
    return (os.environ if environment is None else environment).get(key, "").strip()


def number_of(key: str, environment: Mapping[str, str] | None = None) -> int | None:
    """Return a variable that is a whole number from 0 on, None where it is not set; raises InputError for what is none."""
    text = text_of(key, environment)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InputError(f"{key}={text} in the environment is not a whole number; unset {key}, or set it to one")
    return int(text)


def settle_environment() -> None:
    """Remove variables that are set to nothing, and check those that libraries read as they are imported; raises InputError."""
    if sys.flags.optimize > 1:
        raise InputError("PYTHONOPTIMIZE=2 (python -OO) removes what transformers reads as it is imported; unset it, or PYTHONOPTIMIZE=1")
    for key in [key for key in os.environ if (key in _WITHOUT_NOTHING or key.startswith("HF_")) and not text_of(key)]:
        del os.environ[key]
    for key in [key for key in os.environ if key.startswith("HF_") and key.endswith("_TIMEOUT")]:
        number_of(key)
    if endpoint := text_of("HF_ENDPOINT"):
        try:
            is_address = urlsplit(endpoint).scheme in ("http", "https") and bool(urlsplit(endpoint).hostname)
        except ValueError:
            is_address = False
        if not is_address:
            raise InputError(
                f"HF_ENDPOINT={endpoint} in the environment is not an address such as https://huggingface.co; unset HF_ENDPOINT"
            )


def read_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Return what the launcher's variables say, one rank where none is set; default: those of this process.

    Raises InputError for a set that is not whole or contradicts itself. Where WORLD_SIZE=1 the rest may be missing, and an address alone is
    no set: scripts export it for runs that they start later.
    """
    found = {key: number_of(key, environment) for key in PLACE_KEYS}
    if all(value is None for value in found.values()):
        return Ranks()
    missing = [key for key in _REQUIRED_KEYS if not text_of(key, environment)]
    if missing and found["WORLD_SIZE"] != 1:
        given = " ".join(f"{key}={value}" for key, value in found.items() if value is not None)
        raise InputError(f"{given} in the environment without {', '.join(missing)}: {_WAY_OUT}")
    num_ranks = found["WORLD_SIZE"] or 0
    per_node = num_ranks if found["LOCAL_WORLD_SIZE"] is None else found["LOCAL_WORLD_SIZE"]
    ranks = Ranks(found["RANK"] or 0, num_ranks, found["LOCAL_RANK"] or 0, per_node)
    _check_ranks(ranks)
    port = number_of("MASTER_PORT", environment) if num_ranks > 1 else None
    if port is not None and not 0 < port <= _LARGEST_PORT:
        raise InputError(f"MASTER_PORT={port} in the environment: ports are 1 to {_LARGEST_PORT}")
    return ranks


def _check_ranks(ranks: Ranks) -> None:
    if not ranks.num_ranks:
        raise InputError(f"WORLD_SIZE=0 in the environment: there is at least this rank; {_WAY_OUT}")
    if ranks.rank >= ranks.num_ranks:
        raise InputError(f"RANK={ranks.rank} with WORLD_SIZE={ranks.num_ranks} in the environment: ranks are counted from 0; {_WAY_OUT}")
    if not ranks.local_rank < ranks.ranks_per_node <= ranks.num_ranks:
        raise InputError(
            f"LOCAL_RANK={ranks.local_rank} LOCAL_WORLD_SIZE={ranks.ranks_per_node} WORLD_SIZE={ranks.num_ranks} in the environment "
            f"contradict each other: a node's ranks are counted from 0 and are a part of all; {_WAY_OUT}"
        )


def launched_by(environment: Mapping[str, str] | None = None) -> str | None:
    """Return what started this rank: "torchrun", "srun", or None where neither did."""
    if text_of("TORCHELASTIC_RUN_ID", environment):
        return "torchrun"
    place, count = text_of("SLURM_PROCID", environment), text_of("SLURM_STEP_NUM_TASKS", environment)
    is_adopted = (text_of("RANK", environment), text_of("WORLD_SIZE", environment)) == (place, count)
    return "srun" if place and count and is_adopted else None
