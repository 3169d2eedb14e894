"""Degrees -> process groups. All four axes always exist; on an axis of size 1 nothing is sent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from wan_dist.degrees import Degrees
from wan_dist.environment import read_ranks
from wan_dist.errors import InputError

AXES = ("dp", "cfg", "ring", "ulysses")


@dataclass(frozen=True)
class Axis:
    """Where this rank is on one axis of the mesh, or on several taken together."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None where the size is 1."""


@dataclass(frozen=True)
class Groups:
    """The axes of a run. ``sp``: ring and ulysses together; ``replica``: everything that works on one video; ``world``: all ranks."""

    rank: int = 0
    local_rank: int = 0
    dp: Axis = Axis()
    cfg: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    sp: Axis = Axis()
    replica: Axis = Axis()
    world: Axis = Axis()
    replica_mesh: DeviceMesh | None = None
    """Over which weights are sharded; None for one rank."""


def local_device(name: str) -> torch.device:
    """Return this rank's device of the kind ``name``: on a node, ranks take the GPUs in order of LOCAL_RANK, or the only one they see.

    Raises InputError where there are GPUs, but not for this rank.
    """
    if name != "cuda":
        return torch.device(name)
    ranks, num_gpus = read_ranks(), torch.cuda.device_count()
    if 1 < num_gpus <= ranks.local_rank:
        raise InputError(
            f"LOCAL_RANK={ranks.local_rank}: rank {ranks.rank} sees {num_gpus} GPUs, and each rank takes its own; start at most {num_gpus} "
            "ranks on this node (torchrun --nproc_per_node, srun --ntasks-per-node), or let it see more (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", ranks.local_rank if num_gpus > 1 else 0)
    torch.cuda.set_device(device)
    return device


@contextmanager
def open_groups(degrees: Degrees, device: torch.device, *, timeout: float) -> Iterator[Groups]:
    """Make the process groups for these degrees, and end them on any exit; for one rank there are none.

    Ranks that wait for each other longer than ``timeout`` seconds give up with an error; see `limit_waiting`.
    """
    if degrees.num_ranks == 1:
        yield Groups()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=device if device.type == "cuda" else None)
    try:
        groups = make_groups(degrees, device.type)
        limit_waiting(groups, timeout)  # new groups do not take it over
        yield groups
    except BaseException:
        _end_groups(backend, others_follow=False)
        raise
    _end_groups(backend, others_follow=True)


def _end_groups(backend: str, *, others_follow: bool) -> None:
    """End all process groups; NCCL waits for the other ranks to do the same, so after an error it is told to give up instead."""
    if backend == "nccl" and not others_follow:
        distributed_c10d._abort_process_group()
        return
    dist.destroy_process_group()
    if backend == "gloo":
        # Its threads let go of the last collectives' tensors, for which they need the interpreter; one that is ending aborts them.
        time.sleep(0.1)


def limit_waiting(groups: Groups, timeout: float) -> None:
    """From now on, ranks that wait for each other longer than ``timeout`` seconds give up with an error."""
    for axis in (groups.dp, groups.cfg, groups.ring, groups.ulysses, groups.sp, groups.replica, groups.world):
        if axis.group is not None:
            _set_pg_timeout(timedelta(seconds=timeout), axis.group)


def make_groups(degrees: Degrees, device_type: str) -> Groups:
    """Cut the ranks of the default process group into the axes; called by all of them.

    Axes with the same ranks share a process group: each takes memory of a GPU. Those inside attention have groups of their own, since
    what is sent in a group waits for what was sent before, and weights are gathered ahead.
    """
    ranks = torch.arange(degrees.num_ranks).view(degrees.dp, degrees.cfg, degrees.ring, degrees.ulysses)
    made: dict[tuple[bool, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None]
    made = {(False, (tuple(range(degrees.num_ranks)),)): dist.group.WORLD}

    def axis(*names: str) -> Axis:
        """Return the axis of these dims of the mesh together, which follow each other."""
        dims = [AXES.index(name) for name in names]
        rows = ranks.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2).tolist()
        row = next(row for row in rows if dist.get_rank() in row)
        if len(row) == 1:
            return Axis()
        key = (set(names) <= {"ring", "ulysses"}, tuple(map(tuple, rows)))
        if key not in made:
            made[key] = dist.new_subgroups_by_enumeration(rows)[0]
        return Axis(row.index(dist.get_rank()), len(row), made[key])

    replica = axis("cfg", "ring", "ulysses")
    return Groups(
        rank=dist.get_rank(),
        local_rank=read_ranks().local_rank,
        sp=axis("ring", "ulysses"),
        world=Axis(dist.get_rank(), degrees.num_ranks, dist.group.WORLD),
        replica=replica,
        replica_mesh=None if replica.group is None else DeviceMesh.from_group(replica.group, device_type, mesh_dim_names=("replica",)),
        **{name: axis(name) for name in AXES},
    )
