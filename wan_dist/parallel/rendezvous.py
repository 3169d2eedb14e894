"""Rendezvous store that all ranks of a run share from their start on.

The torchrun agent hosts it, or rank 0 where there is no agent.
"""

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
"""Seconds after which a rank that waits for others logs it."""
_MAX_SILENCE_SECONDS = 30.0
"""Seconds within which the network must acknowledge data that is sent to the store."""


def open_stores(
    ranks: RankLayout, timeout_seconds: float, *, coordinator_number: int = 1
) -> tuple[Store, Store]:
    """Return two connections to the store of a run; a run of one rank has a store in memory.

    Two, since a blocking call occupies its connection. ``timeout_seconds`` is how long to wait for the rank
    that hosts the store; ``coordinator_number`` is the number of this `Coordinator` among those of the
    process. Raises InputError if rank 0 cannot listen on the address, RuntimeError if the address does not
    answer.
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
                f"MASTER_ADDR={host} MASTER_PORT={port} cannot be listened on: "
                f"{get_first_line(error)}; set another MASTER_PORT"
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
    """Return the file descriptors of this process's sockets -> their targets, as ``socket:[inode]``."""
    target_by_descriptor = {}
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if (target := str(file.readlink())).startswith("socket:"):
                target_by_descriptor[int(file.name)] = target
    return target_by_descriptor


def _set_ack_timeout(sockets: dict[int, str], timeout_seconds: float) -> None:
    """Make connections fail if sent data is not acknowledged within ``timeout_seconds``.

    Otherwise a link that is cut blocks for a quarter of an hour.
    """
    for descriptor in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout_seconds)
            )


def describe_address() -> str:
    """Return the address of the rendezvous, with advice if srun started this rank."""
    address = f"{read_text_variable('MASTER_ADDR')}:{read_text_variable('MASTER_PORT')}"
    num_tasks = read_text_variable("SLURM_STEP_NUM_TASKS")
    if detect_launcher() != "srun":
        return address
    return (
        f"{address}; srun gave this step {num_tasks} tasks: start the command itself with srun, "
        "or take --ntasks=1"
    )


@contextmanager
def _log_long_wait(awaited: str) -> Iterator[None]:
    """Log once what this rank waits for, if that takes longer than `_PATIENCE_SECONDS`."""
    timer = threading.Timer(
        _PATIENCE_SECONDS, logger.warning, ("waiting for %s; %s", awaited, describe_address())
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
