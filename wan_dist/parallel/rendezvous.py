"""The store that all ranks of a run share from their start on: torchrun's agent has it, else the first rank."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from wan_dist.runtime.environment import Ranks, launched_by, number_of, text_of
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.log import logger

_PATIENCE = 8.0
"""Seconds after which a rank that waits for others says so."""
_MOST_SILENCE = 30.0
"""Seconds that the network may take to acknowledge what is sent to the store."""


def open_stores(ranks: Ranks, timeout: float, *, number: int = 1) -> tuple[Store, Store]:
    """Return two connections to the store of a run, since a blocking call keeps one to itself; one rank has a store of its own.

    ``timeout``: seconds to wait for the rank that has the store; ``number``: of the team among this process's.
    Raises InputError for an address that is not to be had, RuntimeError for
    one that does not answer.
    """
    if ranks.num_ranks == 1:
        store = HashStore()
        return store, store
    host, port = text_of("MASTER_ADDR"), number_of("MASTER_PORT") or 0
    is_agents = text_of("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = text_of("TORCHELASTIC_RESTART_COUNT") or "0"
    limit, before = timedelta(seconds=timeout), find_sockets()
    try:
        with _saying(f"rank 0 at {host}:{port}"):
            first = TCPStore(host, port, is_master=ranks.rank == 0 and not is_agents, timeout=limit, wait_for_workers=False)
            second = TCPStore(host, first.port, is_master=False, timeout=limit, wait_for_workers=False)
    except RuntimeError as fault:
        if ranks.rank == 0 and not is_agents:
            raise InputError(
                f"MASTER_ADDR={host} MASTER_PORT={port} cannot be listened on: {first_line(fault)}; set another port"
            ) from None
        fault.add_note(f"waiting for rank 0 at {host}:{port}")
        raise
    _limit_silence(dict(find_sockets().items() - before.items()), min(timeout, _MOST_SILENCE))
    prefix = f"wan_dist/{attempt}/{number}"
    return PrefixStore(prefix, first), PrefixStore(prefix, second)


def find_sockets() -> dict[int, str]:
    """Return the descriptors of this process's sockets, and what they are."""
    found = {}
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if (target := str(file.readlink())).startswith("socket:"):
                found[int(file.name)] = target
    return found


def _limit_silence(sockets: dict[int, str], seconds: float) -> None:
    """Have connections fail where what is sent is not acknowledged for so long: a link that is cut else blocks for a quarter of an hour."""
    for number in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


def describe_address() -> str:
    """Return where the ranks meet, and what to do where the others never come."""
    address = f"{text_of('MASTER_ADDR')}:{text_of('MASTER_PORT')}"
    tasks = text_of("SLURM_STEP_NUM_TASKS")
    if launched_by() != "srun":
        return address
    return f"{address}; srun gave this step {tasks} tasks: start the command itself with srun, or take --ntasks=1"


@contextmanager
def _saying(whom: str) -> Iterator[None]:
    """Say once for whom this rank waits, if that takes a while."""
    timer = threading.Timer(_PATIENCE, logger.warning, ("waiting for %s; %s", whom, describe_address()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
