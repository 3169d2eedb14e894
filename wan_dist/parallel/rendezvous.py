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

from wan_dist.runtime.environment import (
    RankLayout,
    detect_launcher,
    read_number_variable,
    read_text_variable,
)
from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.log import logger

_PATIENCE_SECONDS = 8.0
"""Seconds after which a rank that waits for others says so."""
_MAX_SILENCE_SECONDS = 30.0
"""Seconds that the network may take to acknowledge what is sent to the store."""


def open_stores(
    ranks: RankLayout, timeout_seconds: float, *, coordinator_number: int = 1
) -> tuple[Store, Store]:
    """Return two connections to the store of a run, since a blocking call keeps one to itself; one rank has a store of its own.

    ``timeout``: seconds to wait for the rank that has the store; ``number``: of the team among this process's.
    Raises InputError for an address that is not to be had, RuntimeError for
    one that does not answer.
    """
    if ranks.num_ranks == 1:
        store = HashStore()
        return store, store
    host, port = read_text_variable("MASTER_ADDR"), read_number_variable("MASTER_PORT") or 0
    is_agent_store = read_text_variable("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart_count = read_text_variable("TORCHELASTIC_RESTART_COUNT") or "0"
    timeout_delta, sockets_before = timedelta(seconds=timeout_seconds), find_sockets()
    try:
        with _log_long_wait(f"rank 0 at {host}:{port}"):
            first_store = TCPStore(
                host,
                port,
                is_master=ranks.rank == 0 and not is_agent_store,
                timeout=timeout_delta,
                wait_for_workers=False,
            )
            second_store = TCPStore(
                host,
                first_store.port,
                is_master=False,
                timeout=timeout_delta,
                wait_for_workers=False,
            )
    except RuntimeError as error:
        if ranks.rank == 0 and not is_agent_store:
            raise InputError(
                f"MASTER_ADDR={host} MASTER_PORT={port} cannot be listened on: {get_first_line(error)}; set another port"
            ) from None
        error.add_note(f"waiting for rank 0 at {host}:{port}")
        raise
    _set_ack_timeout(
        dict(find_sockets().items() - sockets_before.items()),
        min(timeout_seconds, _MAX_SILENCE_SECONDS),
    )
    prefix = f"wan_dist/{restart_count}/{coordinator_number}"
    return PrefixStore(prefix, first_store), PrefixStore(prefix, second_store)


def find_sockets() -> dict[int, str]:
    """Return the descriptors of this process's sockets, and what they are."""
    target_by_descriptor = {}
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if (target := str(file.readlink())).startswith("socket:"):
                target_by_descriptor[int(file.name)] = target
    return target_by_descriptor


def _set_ack_timeout(sockets: dict[int, str], timeout_seconds: float) -> None:
    """Have connections fail where what is sent is not acknowledged for so long: a link that is cut else blocks for a quarter of an hour."""
    for descriptor in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout_seconds)
            )


def describe_address() -> str:
    """Return where the ranks meet, and what to do where the others never come."""
    address = f"{read_text_variable('MASTER_ADDR')}:{read_text_variable('MASTER_PORT')}"
    num_tasks = read_text_variable("SLURM_STEP_NUM_TASKS")
    if detect_launcher() != "srun":
        return address
    return f"{address}; srun gave this step {num_tasks} tasks: start the command itself with srun, or take --ntasks=1"


@contextmanager
def _log_long_wait(awaited: str) -> Iterator[None]:
    """Say once for whom this rank waits, if that takes a while."""
    timer = threading.Timer(
        _PATIENCE_SECONDS, logger.warning, ("waiting for %s; %s", awaited, describe_address())
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
