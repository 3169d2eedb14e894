"""Device mesh and process groups of a run, made from the degrees of parallelism.

All four axes (dp, cfg, ring, ulysses) always exist; on an axis of size 1 nothing is sent.
"""

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from wan_dist.parallel.rendezvous import find_sockets
from wan_dist.parallel.team import Coordinator, RankError
from wan_dist.planning.degrees import Degrees
from wan_dist.runtime.environment import RankLayout, read_rank_layout
from wan_dist.runtime.errors import InputError

AXIS_NAMES = ("cfg", "ring", "ulysses")

T = TypeVar("T")


@dataclass
class Axis:
    """Position of this rank on one axis of the mesh, or on several axes flattened into one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None where the size is 1, and between replicas, which communicate through the store: see `Coordinator`.

    Replaced when the groups are reopened after an error.
    """


@dataclass
class ProcessGroups:
    """The axes of a run's mesh, and their process groups.

    ``sp`` is ring and ulysses flattened into one axis; ``replica`` holds all ranks that work on one video;
    ``dp`` is the axis of the replicas.
    """

    degrees: Degrees = field(default_factory=Degrees)
    coordinator: Coordinator = field(default_factory=lambda: Coordinator(RankLayout(), 60))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_seconds: float = 600.0
    rank: int = 0
    """Rank in the whole run."""
    local_rank: int = 0
    dp: Axis = field(default_factory=Axis)
    cfg: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)
    ulysses: Axis = field(default_factory=Axis)
    sp: Axis = field(default_factory=Axis)
    replica: Axis = field(default_factory=Axis)
    replica_mesh: DeviceMesh | None = None
    """Mesh over which weights are sharded; None for one rank."""
    gloo_sockets: dict[int, str] = field(default_factory=dict)
    """Sockets of the gloo groups: file descriptors and their targets, see `find_sockets`."""
    is_aborted: bool = False
    """Once set, results may be undefined: on a GPU, aborted collectives end without an error."""
    num_openings: int = 0
    """How many times the process groups were opened."""
    num_keys_used: int = 0
    """Store keys used for joint work so far; the same on all ranks of the replica."""

    @property
    def replica_ranks(self) -> range:
        """The ranks of this replica, as numbered in the whole run."""
        size = self.degrees.ranks_per_replica
        return range(self.dp.rank * size, (self.dp.rank + 1) * size)

    @property
    def distinct_groups(self) -> list[dist.ProcessGroup]:
        """The axes' process groups, each once."""
        axes = (self.cfg, self.ring, self.ulysses, self.sp, self.replica)
        return list(
            {id(axis.group): axis.group for axis in axes if axis.group is not None}.values()
        )

    def open(self) -> None:
        """Create the process groups of all axes, or recreate them; called by all ranks of the replica.

        One rank has none. Axes with the same ranks share a process group, since each takes GPU memory. The
        axes used inside attention have groups of their own: operations of a group run in order, and weights
        are all-gathered ahead of time. Raises RankError if another rank fails meanwhile or is lost.
        """
        if self.replica.size == 1:
            return
        errors: list[BaseException] = []

        def open_groups() -> None:
            try:
                self._open_groups()
            except BaseException as error:
                errors.append(error)

        # In a thread of its own, for two reasons. This rank must not be stuck where another one has failed.
        # And PyTorch counts a thread's open NCCL groups: an abort during the first exchange with a peer
        # leaves one counted in the thread that was in it, which then creates no communicator ("not in a
        # group call").
        thread = threading.Thread(target=open_groups, daemon=True)
        thread.start()
        self.coordinator.wait_until(
            lambda: not thread.is_alive(), "connect", self.replica_ranks, is_interruptible=False
        )
        if errors:
            raise errors[0]

    def _open_groups(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread has device 0
        if dist.is_initialized():
            self.replica_mesh = None
            distributed_c10d._abort_process_group()
            gc.collect()  # gloo closes connections with the last reference to a group
        self.is_aborted = False
        self.num_openings += 1
        sockets_before = find_sockets()
        is_cuda = self.device.type == "cuda"
        backend = "nccl" if is_cuda else "gloo"
        bound_device = self.device if is_cuda else None
        dist.init_process_group(
            backend,
            store=self.coordinator.make_prefix_store(f"groups/{self.dp.rank}/{self.num_openings}"),
            rank=self.coordinator.rank - self.replica_ranks.start,
            world_size=self.degrees.ranks_per_replica,
            timeout=timedelta(seconds=self.timeout_seconds),
            device_id=bound_device,
        )
        self.create_axis_groups()
        if self.replica.group is not None:
            self.replica_mesh = DeviceMesh.from_group(
                self.replica.group, self.device.type, mesh_dim_names=("replica",)
            )
        set_group_timeout(self, self.timeout_seconds)  # new groups do not inherit it
        self.gloo_sockets = dict(find_sockets().items() - sockets_before.items())

    def create_axis_groups(self) -> None:
        """Create the axes' groups from the default process group, whose ranks are the replica's."""
        degrees = self.degrees
        rank_grid = torch.arange(degrees.ranks_per_replica).view(
            1, degrees.cfg, degrees.ring, degrees.ulysses
        )
        group_by_rows: dict[tuple[bool, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None]
        group_by_rows = {(False, (tuple(range(degrees.ranks_per_replica)),)): dist.group.WORLD}
        attention_axes = ("ring", "ulysses")
        axes = (
            (self.replica, AXIS_NAMES),
            (self.sp, attention_axes),
            *((getattr(self, name), (name,)) for name in AXIS_NAMES),
        )
        for axis, axis_names in axes:
            if axis.size == 1:
                continue
            dims = [AXIS_NAMES.index(name) + 1 for name in axis_names]
            rows = (
                rank_grid.movedim(dims, list(range(-len(dims), 0)))
                .flatten(-len(dims))
                .flatten(0, -2)
                .tolist()
            )
            key = (set(axis_names) <= set(attention_axes), tuple(map(tuple, rows)))
            if key not in group_by_rows:
                group_by_rows[key] = dist.new_subgroups_by_enumeration(rows)[0]
            axis.group = group_by_rows[key]

    def abort(self) -> None:
        """Abort the pending operations of all groups on this rank; with gloo, on its peers as well.

        May be called from any thread.
        """
        self.is_aborted = True
        if self.device.type != "cuda":
            _shut_down_sockets(self.gloo_sockets)
            return
        # All at once: the abort of a communicator waits for the kernels of the others on the same GPU.
        threads = [threading.Thread(target=group.abort) for group in self.distinct_groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def raise_if_aborted(self) -> None:
        """Raise RankError if the groups were aborted; called before results, then undefined, are saved."""
        if self.is_aborted:
            raise RankError("another rank has failed in joint work", is_final=False)

    def run_on_first_rank(self, make: Callable[[], T], purpose: str) -> T:
        """Return the result of ``make()``, called on the replica's first rank, on all its ranks.

        The others wait however long it takes. ``purpose`` names it in messages.
        """
        key = self.make_next_key("shared")
        if self.replica.rank == 0:
            value = make()
            if self.replica.size > 1:
                self.coordinator.put(key, (value,))
            return value
        self.coordinator.wait_until(
            lambda: self.coordinator.has(key), purpose, self.replica_ranks[:1]
        )
        return cast(tuple[T], self.coordinator.get(key))[0]

    def make_next_key(self, kind: str) -> str:
        """Return a new key for the run's store, the same on all ranks of the replica and on no others."""
        self.num_keys_used += 1
        return f"{kind}/{self.dp.rank}/{self.num_keys_used}"

    def close(self, *, is_collective: bool) -> None:
        """Destroy all process groups, or abort them.

        NCCL waits until the other ranks destroy theirs too, so after an error (``is_collective=False``, or
        when the groups were aborted) the groups are aborted instead.
        """
        if not dist.is_initialized():
            return
        if not is_collective or self.is_aborted:
            if not self.is_aborted:
                self.abort()
            distributed_c10d._abort_process_group()
            return
        dist.destroy_process_group()
        if self.device.type != "cuda":
            # Gloo's threads release the tensors of the last collectives, for which they need the interpreter;
            # an interpreter that is shutting down would abort the process.
            time.sleep(0.1)


def _shut_down_sockets(sockets: dict[int, str]) -> None:
    """Shut down connections, so that both ends stop waiting; gloo's own abort leaves them open."""
    for descriptor in dict(sockets.items() & find_sockets().items()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            # gloo ends the process if its listening socket is shut down
            if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                connection.shutdown(socket.SHUT_RDWR)


def select_local_device(name: str) -> torch.device:
    """Return this rank's device of the type ``name``, and make it the current one if it is a GPU.

    The ranks of a node take the visible GPUs in the order of LOCAL_RANK; where a rank sees one GPU, it
    takes that one. Raises InputError if several GPUs are visible, but none for this rank.
    """
    if name != "cuda":
        return torch.device(name)
    ranks, num_gpus = read_rank_layout(), torch.cuda.device_count()
    if 1 < num_gpus <= ranks.local_rank:
        raise InputError(
            f"LOCAL_RANK={ranks.local_rank}: rank {ranks.rank} sees {num_gpus} GPUs, and each rank takes "
            f"its own; start at most {num_gpus} ranks on this node (torchrun --nproc_per_node, "
            "srun --ntasks-per-node), or let it see more (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", ranks.local_rank if num_gpus > 1 else 0)
    torch.cuda.set_device(device)
    return device


@contextmanager
def open_process_groups(
    degrees: Degrees, device: torch.device, *, timeout_seconds: float
) -> Iterator[ProcessGroups]:
    """Open the process groups of a run, and close them on any exit; a run of one rank has none.

    Ranks that wait for each other longer than ``timeout_seconds`` fail with an error; see
    `set_group_timeout`.
    """
    ranks = read_rank_layout() if degrees.num_ranks > 1 else RankLayout()
    coordinator = Coordinator(ranks, timeout_seconds)
    try:
        with process_group_session(
            groups := make_process_groups(degrees, coordinator, device, timeout_seconds)
        ):
            yield groups
    finally:
        coordinator.leave()


@contextmanager
def process_group_session(groups: ProcessGroups) -> Iterator[None]:
    """Open the process groups, and close them on any exit."""
    try:
        groups.open()
        yield
    except BaseException:
        groups.close(is_collective=False)
        raise
    groups.close(is_collective=True)


def set_group_timeout(groups: ProcessGroups, timeout_seconds: float) -> None:
    """Set the timeout of all groups: ranks that wait for each other longer fail with an error."""
    for group in groups.distinct_groups:
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def make_process_groups(
    degrees: Degrees, coordinator: Coordinator, device: torch.device, timeout_seconds: float
) -> ProcessGroups:
    """Return this rank's position on the axes of a run, without process groups: see `ProcessGroups.open`."""
    replica_size = degrees.ranks_per_replica
    replica_rank, sp_size = coordinator.rank % replica_size, degrees.ring * degrees.ulysses
    return ProcessGroups(
        degrees,
        coordinator,
        device,
        timeout_seconds,
        rank=coordinator.rank,
        local_rank=read_rank_layout().local_rank,
        dp=Axis(coordinator.rank // replica_size, degrees.dp),
        cfg=Axis(replica_rank // sp_size, degrees.cfg),
        ring=Axis(replica_rank % sp_size // degrees.ulysses, degrees.ring),
        ulysses=Axis(replica_rank % degrees.ulysses, degrees.ulysses),
        sp=Axis(replica_rank % sp_size, sp_size),
        replica=Axis(replica_rank, replica_size),
    )
