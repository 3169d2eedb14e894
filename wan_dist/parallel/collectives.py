"""Collectives and point-to-point transfers of tensors over an axis; no other module sends tensors.

On an axis of size 1 nothing is sent: every function returns what it was given. Tensors may have any strides,
dtype and device: a group exchanges contiguous bytes on its own device, see `_pack_bytes`.
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
# renamed in torch 2.13
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def note_awaited_ranks(axis: Axis) -> Iterator[None]:
    """Add a note to connection errors that names the ranks that this rank was waiting for."""
    try:
        yield
    except RuntimeError as error:
        is_connection_error = isinstance(error, dist.DistError) or "gloo" in str(error)
        if axis.group is not None and is_connection_error and not getattr(error, "__notes__", None):
            awaited_ranks = [
                rank for rank in dist.get_process_group_ranks(axis.group) if rank != dist.get_rank()
            ]
            error.add_note(
                f"waiting for rank{'s' if len(awaited_ranks) > 1 else ''} "
                f"{', '.join(map(str, awaited_ranks))}"
            )
        raise


def _choose_exchange_device(axis: Axis, device: torch.device) -> torch.device:
    """Return the device for exchanges on the axis: ``device`` if its group can use it, else the group's."""
    assert axis.group is not None
    device_types = {group_device.type for group_device in axis.group._device_types}
    if device.type in device_types:
        return device
    return torch.device("cpu" if "cpu" in device_types else device_types.pop())


def _pack_bytes(x: Tensor, axis: Axis) -> Tensor:
    """Return the bytes (n,) of x, uint8, in the order of its dims, as they are sent.

    Backends want contiguous tensors on their own device, and each lacks some dtypes. The data is copied
    only if x is not contiguous or is on another device.
    """
    x = x.to(_choose_exchange_device(axis, x.device)).contiguous()
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # dims of size 1 may have any stride


def _allocate_bytes(like: Tensor, axis: Axis, shape: Sequence[int]) -> Tensor:
    """Return a byte buffer on the exchange device for a tensor of this shape and the dtype of ``like``."""
    return torch.empty(
        math.prod(shape) * like.element_size(),
        dtype=torch.uint8,
        device=_choose_exchange_device(axis, like.device),
    )


def _unpack_bytes(received: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return received bytes as a contiguous tensor of this shape, with the dtype and device of ``like``."""
    return received.view(like.dtype).view(tuple(shape)).to(like.device)


def all_to_all(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Start an all-to-all of x (N, ...), whose slice i goes to rank i of the axis.

    The returned function waits for it and returns (N, ...), whose slice j came from rank j.
    """
    if axis.size == 1:
        return lambda: x
    send_buffer, receive_buffer = _pack_bytes(x, axis), _allocate_bytes(x, axis, x.shape)
    with note_awaited_ranks(axis):
        work = dist.all_to_all_single(receive_buffer, send_buffer, group=axis.group, async_op=True)

    def wait() -> Tensor:
        with note_awaited_ranks(axis):
            work.wait()
        return _unpack_bytes(receive_buffer, x, x.shape)

    return wait


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Return every rank's x (...), in the order of ranks: (N, ...)."""
    if axis.size == 1:
        return x.unsqueeze(0)
    shape = (axis.size, *x.shape)
    receive_buffer = _allocate_bytes(x, axis, shape)
    with note_awaited_ranks(axis):
        _ALL_GATHER(receive_buffer, _pack_bytes(x, axis), group=axis.group)
    return _unpack_bytes(receive_buffer, x, shape)


def _start_transfers(
    sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], axis: Axis
) -> Callable[[], None]:
    """Start sending and receiving byte buffers, each to or from a global rank.

    The returned function waits for all of them.
    """
    operations = [
        dist.P2POp(dist.isend, send_buffer, rank, axis.group) for send_buffer, rank in sends
    ]
    operations += [
        dist.P2POp(dist.irecv, receive_buffer, rank, axis.group)
        for receive_buffer, rank in receives
    ]
    with note_awaited_ranks(axis):
        works = dist.batch_isend_irecv(operations)

    def wait() -> None:
        with note_awaited_ranks(axis):
            for work in works:
                work.wait()
        operations.clear()  # they keep the send buffers alive until here

    return wait


def send_to_next(tensors: list[Tensor], axis: Axis) -> Callable[[], list[Tensor]]:
    """Start sending tensors to the next rank of the axis, and receiving those of the previous one.

    The returned function waits and returns the received tensors. Shapes must be equal on all ranks.
    """
    if axis.size == 1:
        return lambda: tensors
    ranks = dist.get_process_group_ranks(axis.group)
    next_rank, previous_rank = (
        ranks[(axis.rank + 1) % axis.size],
        ranks[(axis.rank - 1) % axis.size],
    )
    receive_buffers = [_allocate_bytes(tensor, axis, tensor.shape) for tensor in tensors]
    wait_for_transfers = _start_transfers(
        [(_pack_bytes(tensor, axis), next_rank) for tensor in tensors],
        [(receive_buffer, previous_rank) for receive_buffer in receive_buffers],
        axis,
    )

    def wait_and_unpack() -> list[Tensor]:
        wait_for_transfers()
        return [
            _unpack_bytes(receive_buffer, tensor, tensor.shape)
            for receive_buffer, tensor in zip(receive_buffers, tensors, strict=True)
        ]

    return wait_and_unpack


def exchange_halos(
    to_previous: Tensor, to_next: Tensor, axis: Axis
) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Start sending ``to_previous`` and ``to_next`` to the neighbouring ranks, and receiving their halos.

    The returned function waits and returns the halos from the previous and from the next rank; None at the
    ends of the axis. Shapes must be equal on all ranks.
    """
    ranks = [0] if axis.size == 1 else dist.get_process_group_ranks(axis.group)
    has_previous, has_next = axis.rank > 0, axis.rank < axis.size - 1
    sends, receives = [], []
    for outgoing, incoming_like, rank_offset, has_neighbour in (
        (to_previous, to_next, -1, has_previous),
        (to_next, to_previous, 1, has_next),
    ):
        if has_neighbour:
            sends.append((_pack_bytes(outgoing, axis), ranks[axis.rank + rank_offset]))
            receives.append(
                (
                    _allocate_bytes(incoming_like, axis, incoming_like.shape),
                    ranks[axis.rank + rank_offset],
                )
            )
    if not sends:
        return lambda: (None, None)
    wait_for_transfers = _start_transfers(sends, receives, axis)

    def wait_and_unpack() -> tuple[Tensor | None, Tensor | None]:
        wait_for_transfers()
        from_previous = (
            _unpack_bytes(receives[0][0], to_next, to_next.shape) if has_previous else None
        )
        from_next = (
            _unpack_bytes(receives[-1][0], to_previous, to_previous.shape) if has_next else None
        )
        return from_previous, from_next

    return wait_and_unpack


def gather_on_first_rank(x: Tensor, lengths: list[int], dim: int, axis: Axis) -> Tensor | None:
    """Return every rank's x, concatenated along ``dim``, on the first rank of the axis; None on the others.

    Shapes differ in ``dim`` only, where the ranks' sizes are ``lengths``.
    """
    if axis.size == 1:
        return x
    ranks = dist.get_process_group_ranks(axis.group)
    with note_awaited_ranks(axis):
        if axis.rank:
            dist.send(_pack_bytes(x, axis), ranks[0], group=axis.group)
            return None
        parts = [x]
        for rank, length in zip(ranks[1:], lengths[1:], strict=True):
            shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
            receive_buffer = _allocate_bytes(x, axis, shape)
            dist.recv(receive_buffer, rank, group=axis.group)
            parts.append(_unpack_bytes(receive_buffer, x, shape))
    return torch.cat(parts, dim=dim)


def broadcast(x: Tensor | None, axis: Axis, device: torch.device) -> Tensor | None:
    """Return the first rank's tensor, or None if it has none, on ``device`` on all ranks of the axis."""
    if axis.size == 1:
        return None if x is None else x.to(device)
    header = broadcast_object(None if x is None else (tuple(x.shape), x.dtype), axis)
    if header is None:
        return None
    shape, dtype = header
    like = torch.empty(0, dtype=dtype, device=device)
    payload = (
        _pack_bytes(x.to(device), axis)
        if axis.rank == 0 and x is not None
        else _allocate_bytes(like, axis, shape)
    )
    with note_awaited_ranks(axis):
        dist.broadcast(payload, group=axis.group, group_src=0)
    return _unpack_bytes(payload, like, shape)


def broadcast_object(value: T, axis: Axis) -> T:
    """Return the first rank's value, which must be picklable, on all ranks of the axis."""
    if axis.size == 1:
        return value
    object_list = [value]
    with note_awaited_ranks(axis):
        dist.broadcast_object_list(object_list, group=axis.group, group_src=0)
    return object_list[0]


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Return every rank's value, which must be picklable, in the order of ranks, on all ranks of the axis."""
    if axis.size == 1:
        return [value]
    objects: list[T | None] = [None] * axis.size
    with note_awaited_ranks(axis):
        dist.all_gather_object(objects, value, group=axis.group)
    return cast(list[T], objects)
