"""Launcher environment variables: rank of this process and number of ranks, read and validated; no torch.

They are checked here and nowhere else. torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; `launcher.translate_slurm_variables` derives them from srun's. An incomplete set
is an error: a rank that guessed the rest would wait for ranks that never start. A variable that is set to an
empty string, as .env and compose files leave it, counts as not set.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from wan_dist.runtime.errors import InputError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *ADDRESS_VARIABLES)
_MAX_PORT = 65535
_LAUNCH_ADVICE = (
    "start ranks with torchrun or srun, which set all of them, or run alone: "
    f"unset {' '.join(RANK_VARIABLES)}"
)

_VARIABLES_UNSET_IF_EMPTY = (
    *RANK_VARIABLES,
    *ADDRESS_VARIABLES,
    "HOME",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)
"""Removed if empty, as are those of the Hugging Face libraries (HF_*).

An empty variable counts as not set here, but libraries read it as an empty name or number.
"""


@dataclass(frozen=True)
class RankLayout:
    """Rank of this process and number of ranks, in the run and on its node."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1


def read_text_variable(key: str, environ: Mapping[str, str] | None = None) -> str:
    """Return a variable's value without surrounding whitespace; an empty string if it is not set."""
    return (os.environ if environ is None else environ).get(key, "").strip()


def read_number_variable(key: str, environ: Mapping[str, str] | None = None) -> int | None:
    """Return a variable's value as a whole number from 0 on, None if it is not set.

    Raises InputError for any other value.
    """
    text = read_text_variable(key, environ)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InputError(
            f"{key}={text} in the environment is not a whole number; unset {key}, or correct it"
        )
    return int(text)


def sanitize_environment() -> None:
    """Remove empty variables, and check those that libraries read when they are imported.

    Raises InputError, also for ``python -OO``.
    """
    if sys.flags.optimize > 1:
        raise InputError(
            "PYTHONOPTIMIZE=2 (python -OO) removes docstrings that transformers reads "
            "when it is imported; unset it, or set PYTHONOPTIMIZE=1"
        )
    for key in [
        key
        for key in os.environ
        if (key in _VARIABLES_UNSET_IF_EMPTY or key.startswith("HF_"))
        and not read_text_variable(key)
    ]:
        del os.environ[key]
    for key in [key for key in os.environ if key.startswith("HF_") and key.endswith("_TIMEOUT")]:
        read_number_variable(key)
    if endpoint := read_text_variable("HF_ENDPOINT"):
        try:
            is_http_url = urlsplit(endpoint).scheme in ("http", "https") and bool(
                urlsplit(endpoint).hostname
            )
        except ValueError:
            is_http_url = False
        if not is_http_url:
            raise InputError(
                f"HF_ENDPOINT={endpoint} in the environment is not a URL such as "
                "https://huggingface.co; unset HF_ENDPOINT, or correct it"
            )


def silence_library_warnings(environ: MutableMapping[str, str]) -> None:
    """Have PyTorch's C++ code log errors only, unless the variables ask for more; before it is imported.

    Its warnings are for developers, as that of NCCL about unbatched sends between ranks, once for each pair.
    """
    if "TORCH_DISTRIBUTED_DEBUG" not in environ:
        environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def read_rank_layout(environ: Mapping[str, str] | None = None) -> RankLayout:
    """Return the rank layout that the launcher's variables give, one rank if none of them is set.

    ``environ`` defaults to the environment of this process. Raises InputError for a set that is incomplete
    or contradicts itself. With WORLD_SIZE=1 the other variables may be missing, and an address alone is not
    a set: scripts export it for runs that they start later.
    """
    number_by_variable = {key: read_number_variable(key, environ) for key in RANK_VARIABLES}
    if all(value is None for value in number_by_variable.values()):
        return RankLayout()
    missing_variables = [key for key in _REQUIRED_VARIABLES if not read_text_variable(key, environ)]
    if missing_variables and number_by_variable["WORLD_SIZE"] != 1:
        present_variables = " ".join(
            f"{key}={value}" for key, value in number_by_variable.items() if value is not None
        )
        raise InputError(
            f"{present_variables} in the environment without {', '.join(missing_variables)}: "
            f"{_LAUNCH_ADVICE}"
        )
    num_ranks = number_by_variable["WORLD_SIZE"] or 0
    ranks_per_node = (
        num_ranks
        if number_by_variable["LOCAL_WORLD_SIZE"] is None
        else number_by_variable["LOCAL_WORLD_SIZE"]
    )
    ranks = RankLayout(
        number_by_variable["RANK"] or 0,
        num_ranks,
        number_by_variable["LOCAL_RANK"] or 0,
        ranks_per_node,
    )
    _check_rank_layout(ranks)
    port = read_number_variable("MASTER_PORT", environ) if num_ranks > 1 else None
    if port is not None and not 0 < port <= _MAX_PORT:
        raise InputError(f"MASTER_PORT={port} in the environment must be 1 to {_MAX_PORT}")
    return ranks


def _check_rank_layout(ranks: RankLayout) -> None:
    if not ranks.num_ranks:
        raise InputError(f"WORLD_SIZE=0 in the environment must be at least 1; {_LAUNCH_ADVICE}")
    if ranks.rank >= ranks.num_ranks:
        raise InputError(
            f"RANK={ranks.rank} with WORLD_SIZE={ranks.num_ranks} in the environment: "
            f"a rank is below their number; {_LAUNCH_ADVICE}"
        )
    if not ranks.local_rank < ranks.ranks_per_node <= ranks.num_ranks:
        raise InputError(
            f"LOCAL_RANK={ranks.local_rank} LOCAL_WORLD_SIZE={ranks.ranks_per_node} "
            f"WORLD_SIZE={ranks.num_ranks} in the environment contradict each other: "
            f"a local rank is below the ranks of its node, which are some of all; {_LAUNCH_ADVICE}"
        )


def detect_launcher(environ: Mapping[str, str] | None = None) -> str | None:
    """Return the launcher that started this rank: "torchrun", "srun", or None if neither did."""
    if read_text_variable("TORCHELASTIC_RUN_ID", environ):
        return "torchrun"
    task_rank, num_tasks = (
        read_text_variable("SLURM_PROCID", environ),
        read_text_variable("SLURM_STEP_NUM_TASKS", environ),
    )
    # every process of a Slurm step inherits these: `launcher.translate_slurm_variables` has set RANK by them
    is_adopted = (
        read_text_variable("RANK", environ),
        read_text_variable("WORLD_SIZE", environ),
    ) == (task_rank, num_tasks)
    return "srun" if task_rank and num_tasks and is_adopted else None
