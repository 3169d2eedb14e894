"""Blocks of a model whose weights stay on the host or on disk and visit the device in turn, two at a time.

A block's weights are one flat array on the host. On the device there are two such arrays, of which blocks' parameters are views: while one
block computes, the next one's weights arrive in the other, on a stream of their own.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
_NUM_SLOTS = 2
_PORTABLE = 1  # cudaHostRegisterPortable

Read = Callable[[int, dict[str, Tensor]], None]
"""Fill a block's parameters, by their names in the block, with the values of the block of this number."""


class Layout:
    """Where the parameters of a block lie in one flat array of bytes."""

    def __init__(self, block: nn.Module) -> None:
        self.places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self.num_bytes = 0
        for name, parameter in block.named_parameters():
            self.places[name] = self.num_bytes, parameter.dtype, parameter.shape
            self.num_bytes += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, array: Tensor) -> dict[str, Tensor]:
        """Return the parameters as views of an array (num_bytes), uint8."""
        return {
            name: array[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (start, dtype, shape) in self.places.items()
        }


class BlockReader:
    """Blocks' arrays on the host, a few of them read at once, ahead of their use; with ``keep`` they stay, so each is read once."""

    num_ahead = 3

    def __init__(self, layouts: Sequence[Layout], read: Read, device: torch.device, *, keep: bool, end: int | None = None) -> None:
        self._layouts, self._num_blocks, self._read, self._keep, self._end = layouts, len(layouts), read, keep, end
        self._pin = device.type == "cuda"
        self._most = max(layout.num_bytes for layout in layouts)
        self._threads = _threads_for(device, self.num_ahead)  # one alone is slower than disks are, and page-locking takes its time
        self._begun: dict[int, Future[Tensor]] = {}
        self._spare: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def get(self, turn: int) -> Tensor:
        """Return the array of the block of this turn, counted over all rounds, when it has been read; it stays as it is until `let_go`."""
        for ahead in range(turn, turn + min(self.num_ahead, self._num_blocks)):
            if self._end is None or ahead < self._end:
                self._begin(ahead % self._num_blocks)
        return self._begun[turn % self._num_blocks].result()

    def let_go(self, index: int, copied: Callable[[], None]) -> None:
        """Be told that a block's array is not needed any more once ``copied()`` returns."""
        if not self._keep:
            self._spare.append((self._begun.pop(index).result(), copied))

    def _begin(self, index: int) -> None:
        if index in self._begun:
            return
        spare = self._spare.popleft() if self._spare else None
        layout, read, pin = self._layouts[index], self._read, self._pin
        num_bytes = layout.num_bytes if self._keep else self._most

        def load() -> Tensor:
            if spare is None:
                array = host_array(num_bytes, pin=pin)
            else:
                array, copied = spare
                copied()
            read(index, layout.views(array))
            return array

        self._begun[index] = self._threads.submit(load)


class Streamer:
    """Brings blocks' weights to the device ahead of their turn, in the order of the blocks, over and over.

    It refers to no block, so that it goes, with all that it holds, as soon as the blocks do and the last block has come.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], layouts: Sequence[Layout], reader: BlockReader, device: torch.device, end: int | None = None
    ) -> None:
        self._layouts, self._reader, self._device, self._end = layouts, reader, device, end
        most = max(layout.num_bytes for layout in layouts)
        self._slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(min(_NUM_SLOTS, len(blocks)))]
        self._held: list[int | None] = [None] * len(blocks)
        self._thread = _threads_for(device, 1)  # it waits for the reader, so that whoever computes need not
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._count = 0
        self._arriving: deque[Future[Callable[[], None]]] = deque()
        for _ in self._slots:
            self._bring_next()
        for index, block in enumerate(blocks):
            self._point(block, index, index % len(self._slots))
            block.register_forward_pre_hook(partial(self._arrive, index))
            block.register_forward_hook(self._leave)

    def _point(self, block: nn.Module, index: int, slot: int) -> None:
        """Make a block's parameters views of a slot."""
        if self._held[index] == slot:
            return
        self._held[index] = slot
        for name, view in self._layouts[index].views(self._slots[slot]).items():
            owner, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(owner), attribute, nn.Parameter(view, requires_grad=False))

    def _bring_next(self) -> None:
        """Begin to bring the next block into the slot that has just been left, if there is a next one."""
        turn = self._count
        if turn == self._end:
            return
        index = turn % len(self._layouts)
        size = self._layouts[index].num_bytes
        slot = self._slots[turn % len(self._slots)][:size]
        self._count += 1
        left = _now(self._device)

        def bring() -> Callable[[], None]:
            array = self._reader.get(turn)[:size]
            if self._stream is None or left is None:
                slot.copy_(array)
                self._reader.let_go(index, lambda: None)
                return lambda: None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(left)
                slot.copy_(array, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
            self._reader.let_go(index, arrived.synchronize)
            return lambda: torch.cuda.current_stream(self._device).wait_event(arrived)

        self._arriving.append(self._thread.submit(bring))

    def _arrive(self, index: int, block: nn.Module, _: object) -> None:
        turn = self._count - len(self._arriving)
        if turn == self._end:
            raise RuntimeError(f"streamed blocks are called once more than the {self._end} times that were said")
        if turn % len(self._layouts) != index:
            raise RuntimeError(f"streamed blocks are called in order: block {index} was called in the turn of {turn % len(self._layouts)}")
        self._arriving.popleft().result()()
        self._point(block, index, turn % len(self._slots))

    def _leave(self, *_: object) -> None:
        self._bring_next()


@dataclass(frozen=True)
class Streaming:
    """Which blocks' weights visit the device in turn, and from where."""

    blocks: str
    """Name of the list of blocks in the model."""
    from_disk: bool = False
    """They are read from disk each time, and not kept in host memory."""
    leave: tuple[str, ...] = ()
    """What else is not loaded: beginnings of parameters' names."""
    num_rounds: int | None = None
    """How often all blocks are called, where that is known: nothing is read ahead after the last."""


def stream_blocks(blocks: Sequence[nn.Module], read: Read, device: torch.device, *, from_disk: bool, num_rounds: int | None = None) -> None:
    """Let the weights of these blocks, on meta, visit the device in turn; each call of a block must be followed by the next's.

    ``read`` fills a block's parameters on the host, in threads of their own: once a block where host memory keeps them, every time
    with ``from_disk``.
    """
    layouts = [Layout(block) for block in blocks]
    end = None if num_rounds is None else num_rounds * len(blocks)
    reader = BlockReader(layouts, read, device, keep=not from_disk, end=end)
    Streamer(blocks, layouts, reader, device, end)


def _threads_for(device: torch.device, number: int) -> ThreadPoolExecutor:
    """Return threads whose current device is this one: by themselves they would open the first GPU, and take memory there."""
    if device.type != "cuda":
        return ThreadPoolExecutor(number)
    return ThreadPoolExecutor(number, initializer=torch.cuda.set_device, initargs=(device,))


def host_array(num_bytes: int, *, pin: bool) -> Tensor:
    """Return bytes on the host, page-locked with ``pin``; PyTorch's own pinned memory is rounded up to a power of two."""
    array = torch.empty(num_bytes, dtype=torch.uint8)
    if pin:
        runtime, pointer = torch.cuda.cudart(), array.data_ptr()
        fault = runtime.cudaHostRegister(pointer, num_bytes, _PORTABLE)
        if int(fault):
            raise MemoryError(f"{num_bytes / 2**30:.2f} GiB of host memory cannot be page-locked (CUDA error {int(fault)}); see ulimit -l")
        weakref.finalize(array.untyped_storage(), runtime.cudaHostUnregister, pointer)
    return array


def _now(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at this point of the current stream; None where there are no streams."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
