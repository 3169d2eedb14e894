"""The only place that sends tensors between ranks. On an axis of size 1 every function returns its input.

Tensors may have any strides, dtype and device: what a group exchanges are contiguous bytes on its own device, see `_bytes_of`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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


def _device_of(axis: Axis, device: torch.device) -> torch.device:
    """Return the device on which the axis exchanges tensors: the one given where its group can, else the group's own."""
    assert axis.group is not None
    types = {kind.type for kind in axis.group._device_types}
    return device if device.type in types else torch.device("cpu" if "cpu" in types else types.pop())


def _bytes_of(x: Tensor, axis: Axis) -> Tensor:
    """Return x as it is sent, its bytes (n,) in the order of its dims; a copy only where x is not so in memory already.

    Backends want contiguous tensors on their own device, and each lacks some dtypes.
    """
    x = x.to(_device_of(axis, x.device)).contiguous()
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # dims of size 1 may have any stride


def _empty_bytes(x: Tensor, axis: Axis, shape: Sequence[int]) -> Tensor:
    """Return room for the bytes of a tensor like x, but for its shape."""
    return torch.empty(math.prod(shape) * x.element_size(), dtype=torch.uint8, device=_device_of(axis, x.device))


def _tensor_of(received: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor like x, but for its shape, whose bytes were received; contiguous."""
    return received.view(x.dtype).view(tuple(shape)).to(x.device)


def all_to_all(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """x (N, ...): share i goes to rank i of the axis; begun now, the call returns (N, ...), share j from rank j."""
    if axis.size == 1:
        return lambda: x
    sent, received = _bytes_of(x, axis), _empty_bytes(x, axis, x.shape)
    with name_those_awaited(axis):
        work = dist.all_to_all_single(received, sent, group=axis.group, async_op=True)

    def wait() -> Tensor:
        with name_those_awaited(axis):
            work.wait()
        return _tensor_of(received, x, x.shape)

    return wait


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Return (N, ...): every rank's x, in the order of ranks."""
    if axis.size == 1:
        return x.unsqueeze(0)
    shape = (axis.size, *x.shape)
    received = _empty_bytes(x, axis, shape)
    with name_those_awaited(axis):
        _ALL_GATHER(received, _bytes_of(x, axis), group=axis.group)
    return _tensor_of(received, x, shape)


def _start(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], axis: Axis) -> Callable[[], None]:
    """Start to send and receive bytes, each to or from a rank of the world; the call that comes back waits for all of them."""
    operations = [dist.P2POp(dist.isend, sent, rank, axis.group) for sent, rank in sends]
    operations += [dist.P2POp(dist.irecv, received, rank, axis.group) for received, rank in receives]
    with name_those_awaited(axis):
        works = dist.batch_isend_irecv(operations)

    def wait() -> None:
        with name_those_awaited(axis):
            for work in works:
                work.wait()
        operations.clear()  # until now they have held what is sent

    return wait


def pass_on(tensors: list[Tensor], axis: Axis) -> Callable[[], list[Tensor]]:
    """Begin to send tensors to the next rank of the axis; the call that comes back waits for those of the one before.

    All ranks' shapes are equal.
    """
    if axis.size == 1:
        return lambda: tensors
    ranks = dist.get_process_group_ranks(axis.group)
    after, before = ranks[(axis.rank + 1) % axis.size], ranks[(axis.rank - 1) % axis.size]
    received = [_empty_bytes(tensor, axis, tensor.shape) for tensor in tensors]
    wait = _start([(_bytes_of(tensor, axis), after) for tensor in tensors], [(part, before) for part in received], axis)

    def arrived() -> list[Tensor]:
        wait()
        return [_tensor_of(part, tensor, tensor.shape) for part, tensor in zip(received, tensors, strict=True)]

    return arrived


def trade_edges(first: Tensor, last: Tensor, axis: Axis) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Begin to give ``first`` to the rank before and ``last`` to the one after; the call waits for theirs.

    None at the ends of the axis. All ranks' shapes are equal.
    """
    ranks = [0] if axis.size == 1 else dist.get_process_group_ranks(axis.group)
    has_before, has_after = axis.rank > 0, axis.rank < axis.size - 1
    sends, receives = [], []
    for edge, arriving, step, is_there in ((first, last, -1, has_before), (last, first, 1, has_after)):
        if is_there:
            sends.append((_bytes_of(edge, axis), ranks[axis.rank + step]))
            receives.append((_empty_bytes(arriving, axis, arriving.shape), ranks[axis.rank + step]))
    if not sends:
        return lambda: (None, None)
    wait = _start(sends, receives, axis)

    def arrived() -> tuple[Tensor | None, Tensor | None]:
        wait()
        before = _tensor_of(receives[0][0], last, last.shape) if has_before else None
        after = _tensor_of(receives[-1][0], first, first.shape) if has_after else None
        return before, after

    return arrived


def gather_on_first(x: Tensor, lengths: list[int], dim: int, axis: Axis) -> Tensor | None:
    """Return every rank's x, put together along ``dim``, on the first rank of the axis; None on the others.

    Shapes differ in that dim only, where they are ``lengths``.
    """
    if axis.size == 1:
        return x
    ranks = dist.get_process_group_ranks(axis.group)
    with name_those_awaited(axis):
        if axis.rank:
            dist.send(_bytes_of(x, axis), ranks[0], group=axis.group)
            return None
        parts = [x]
        for rank, length in zip(ranks[1:], lengths[1:], strict=True):
            shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
            received = _empty_bytes(x, axis, shape)
            dist.recv(received, rank, group=axis.group)
            parts.append(_tensor_of(received, x, shape))
    return torch.cat(parts, dim=dim)


def broadcast(x: Tensor | None, axis: Axis, device: torch.device) -> Tensor | None:
    """Return the first rank's tensor, or None if that has none, on ``device`` of all ranks of the axis."""
    if axis.size == 1:
        return None if x is None else x.to(device)
    described = broadcast_object(None if x is None else (tuple(x.shape), x.dtype), axis)
    if described is None:
        return None
    shape, dtype = described
    like = torch.empty(0, dtype=dtype, device=device)
    moved = _bytes_of(x.to(device), axis) if axis.rank == 0 and x is not None else _empty_bytes(like, axis, shape)
    with name_those_awaited(axis):
        dist.broadcast(moved, group=axis.group, group_src=0)
    return _tensor_of(moved, like, shape)


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
