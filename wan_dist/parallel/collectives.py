"""The only place that sends tensors between ranks. On an axis of size 1 every function returns its input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from wan_dist.parallel.mesh import Axis

T = TypeVar("T")
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


@contextmanager
def name_those_awaited(axis: Axis) -> Iterator[None]:
    """Say in an error of a connection for which other ranks this one was waiting."""
    try:
        yield
    except RuntimeError as fault:
        is_of_connection = isinstance(fault, dist.DistError) or "gloo" in str(fault)
        if axis.group is not None and is_of_connection and not getattr(fault, "__notes__", None):
            others = [rank for rank in dist.get_process_group_ranks(axis.group) if rank != dist.get_rank()]
            fault.add_note(f"waiting for rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}")
        raise


def all_to_all(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """x (N, ...): share i goes to rank i of the axis; begun now, the call returns (N, ...), share j from rank j."""
    if axis.size == 1:
        return lambda: x
    x = x.contiguous()
    out = torch.empty_like(x)
    with name_those_awaited(axis):
        work = dist.all_to_all_single(out, x, group=axis.group, async_op=True)

    def wait() -> Tensor:
        with name_those_awaited(axis):
            work.wait()
        return out

    return wait


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Return (N, ...): every rank's x, in the order of ranks."""
    if axis.size == 1:
        return x.unsqueeze(0)
    out = x.new_empty(axis.size * x.numel())
    with name_those_awaited(axis):
        _ALL_GATHER(out, x.contiguous().view(-1), group=axis.group)
    return out.view(axis.size, *x.shape)


def _begin(operations: list[dist.P2POp], received: T, axis: Axis) -> Callable[[], T]:
    """Start to send and receive; the call that comes back waits and returns ``received``."""
    with name_those_awaited(axis):
        works = dist.batch_isend_irecv(operations)

    def wait() -> T:
        with name_those_awaited(axis):
            for work in works:
                work.wait()
        return received

    return wait


def pass_on(tensors: list[Tensor], axis: Axis) -> Callable[[], list[Tensor]]:
    """Begin to send tensors to the next rank of the axis; the call that comes back waits for those of the one before.

    All ranks' shapes are equal.
    """
    received = [torch.empty_like(tensor) for tensor in tensors]
    assert axis.group is not None
    ranks = dist.get_process_group_ranks(axis.group)
    after, before = ranks[(axis.rank + 1) % axis.size], ranks[(axis.rank - 1) % axis.size]
    operations = [dist.P2POp(dist.isend, tensor.contiguous(), after, axis.group) for tensor in tensors]
    operations += [dist.P2POp(dist.irecv, tensor, before, axis.group) for tensor in received]
    return _begin(operations, received, axis)


def trade_edges(first: Tensor, last: Tensor, axis: Axis) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Begin to give ``first`` to the rank before and ``last`` to the one after; the call waits for theirs.

    None at the ends of the axis. All ranks' shapes are equal.
    """
    assert axis.group is not None
    ranks = dist.get_process_group_ranks(axis.group)
    before = torch.empty_like(last) if axis.rank > 0 else None
    after = torch.empty_like(first) if axis.rank < axis.size - 1 else None
    operations = []
    for kept, received, step in ((first, before, -1), (last, after, 1)):
        if received is not None:
            other = ranks[axis.rank + step]
            operations += [dist.P2POp(dist.isend, kept, other, axis.group), dist.P2POp(dist.irecv, received, other, axis.group)]
    return _begin(operations, (before, after), axis)


def gather_on_first(x: Tensor, lengths: list[int], dim: int, axis: Axis) -> Tensor | None:
    """Return every rank's x, put together along ``dim``, on the first rank of the axis; None on the others.

    Shapes differ in that dim only, where they are ``lengths``.
    """
    if axis.size == 1:
        return x
    assert axis.group is not None
    ranks = dist.get_process_group_ranks(axis.group)
    with name_those_awaited(axis):
        if axis.rank:
            dist.send(x.contiguous(), ranks[0], group=axis.group)
            return None
        parts = [x]
        for rank, length in zip(ranks[1:], lengths[1:], strict=True):
            parts.append(x.new_empty([*x.shape[:dim], length, *x.shape[dim + 1 :]]))
            dist.recv(parts[-1], rank, group=axis.group)
    return torch.cat(parts, dim=dim)


def broadcast(x: Tensor | None, axis: Axis, device: torch.device) -> Tensor | None:
    """Return the first rank's tensor, or None if that has none, on all ranks of the axis."""
    if axis.size == 1:
        return x
    described = broadcast_object(None if x is None else (tuple(x.shape), x.dtype), axis)
    if described is None:
        return None
    shape, dtype = described
    out = x.to(device).contiguous() if axis.rank == 0 and x is not None else torch.empty(shape, dtype=dtype, device=device)
    with name_those_awaited(axis):
        dist.broadcast(out, group=axis.group, group_src=0)
    return out


def broadcast_object(value: T, axis: Axis) -> T:
    """Return the first rank's value, any that can be pickled, on all ranks of the axis."""
    if axis.size == 1:
        return value
    box = [value]
    with name_those_awaited(axis):
        dist.broadcast_object_list(box, group=axis.group, group_src=0)
    return box[0]


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Return every rank's value, any that can be pickled, in the order of ranks, on all ranks of the axis."""
    if axis.size == 1:
        return [value]
    found: list[T | None] = [None] * axis.size
    with name_those_awaited(axis):
        dist.all_gather_object(found, value, group=axis.group)
    return cast(list[T], found)
