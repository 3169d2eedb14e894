"""Weight streaming: blocks' weights stay on the host or on disk and are copied to the device block by block.

A block's weights are one flat array on the host. On the device there are two such arrays (slots), of which
the blocks' parameters are views: while one block computes, the next one's weights are copied to the other
slot, on a CUDA stream of their own.
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT_BYTES = 256
"""Of each parameter in a block's array: what cudaMalloc guarantees, and kernels may expect."""
NUM_SLOTS = 2
"""Arrays on the device: one to compute with, one to copy to."""
_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable

BlockFiller = Callable[[int, dict[str, Tensor]], None]
"""(block index, parameters by name in the block) -> None: fills them with that block's values."""


class BlockLayout:
    """Offsets, dtypes and shapes of a block's parameters in one flat array of bytes."""

    def __init__(self, block: nn.Module) -> None:
        self.entries_by_name: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self.num_bytes = 0
        for name, parameter in block.named_parameters():
            self.entries_by_name[name] = self.num_bytes, parameter.dtype, parameter.shape
            self.num_bytes += -(-parameter.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def make_views(self, array: Tensor) -> dict[str, Tensor]:
        """Return the parameters as views of ``array`` (num_bytes,), uint8."""
        return {
            name: array[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (start, dtype, shape) in self.entries_by_name.items()
        }


class BlockReader:
    """Reads blocks into arrays on the host, a few at once and ahead of their use.

    With ``keep_in_memory`` each block is read once and its array stays; without, released arrays are reused.
    Nothing is read from turn ``end_turn`` on.
    """

    num_ahead = 3
    """Reads at once: one alone is slower than disks are, and page-locking takes time."""

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        fill_block: BlockFiller,
        device: torch.device,
        *,
        keep_in_memory: bool,
        end_turn: int | None = None,
    ) -> None:
        self._layouts, self._num_blocks = layouts, len(layouts)
        self._fill_block = fill_block
        self._keep_in_memory, self._end_turn = keep_in_memory, end_turn
        self._is_pinned = device.type == "cuda"
        self._max_bytes = max(layout.num_bytes for layout in layouts)
        self._thread_pool = _make_thread_pool(device, self.num_ahead)
        self._futures: dict[int, Future[Tensor]] = {}
        self._spare_arrays: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def get(self, turn: int) -> Tensor:
        """Return the array of the block of this turn, counted over all rounds, once it has been read.

        It does not change until `release`.
        """
        for future_turn in range(turn, turn + min(self.num_ahead, self._num_blocks)):
            if self._end_turn is None or future_turn < self._end_turn:
                self._start_reading(future_turn % self._num_blocks)
        return self._futures[turn % self._num_blocks].result()

    def release(self, index: int, wait_for_copy: Callable[[], None]) -> None:
        """Mark a block's array as reusable once ``wait_for_copy()`` returns, unless arrays stay in memory."""
        if not self._keep_in_memory:
            self._spare_arrays.append((self._futures.pop(index).result(), wait_for_copy))

    def _start_reading(self, index: int) -> None:
        if index in self._futures:
            return
        spare_array = self._spare_arrays.popleft() if self._spare_arrays else None
        layout, fill_block, is_pinned = self._layouts[index], self._fill_block, self._is_pinned
        num_bytes = layout.num_bytes if self._keep_in_memory else self._max_bytes

        def read_array() -> Tensor:
            if spare_array is None:
                array = allocate_host_array(num_bytes, pin=is_pinned)
            else:
                array, wait_for_copy = spare_array
                wait_for_copy()
            fill_block(index, layout.make_views(array))
            return array

        self._futures[index] = self._thread_pool.submit(read_array)


class BlockStreamer:
    """Copies blocks' weights to the device ahead of their turn, in the order of the blocks, in rounds.

    It holds no reference to the blocks, so that it is freed, with its buffers, as soon as the blocks are and
    the last copy is done.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        layouts: Sequence[BlockLayout],
        reader: BlockReader,
        device: torch.device,
        end_turn: int | None = None,
    ) -> None:
        self._layouts, self._reader = layouts, reader
        self._device, self._end_turn = device, end_turn
        max_bytes = max(layout.num_bytes for layout in layouts)
        self._slots = [
            torch.empty(max_bytes, dtype=torch.uint8, device=device)
            for _ in range(min(NUM_SLOTS, len(blocks)))
        ]
        self._slot_by_block: list[int | None] = [None] * len(blocks)
        # This thread waits for the reader, so that the computing one does not.
        self._copy_thread = _make_thread_pool(device, 1)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._num_started = 0
        self._pending_copies: deque[Future[Callable[[], None]]] = deque()
        for _ in self._slots:
            self._start_next_copy()
        for index, block in enumerate(blocks):
            self._bind_to_slot(block, index, index % len(self._slots))
            block.register_forward_pre_hook(partial(self._wait_before_forward, index))
            block.register_forward_hook(self._refill_after_forward)

    def _bind_to_slot(self, block: nn.Module, index: int, slot: int) -> None:
        """Make a block's parameters views of a slot."""
        if self._slot_by_block[index] == slot:
            return
        self._slot_by_block[index] = slot
        for name, view in self._layouts[index].make_views(self._slots[slot]).items():
            module_name, _, attribute = name.rpartition(".")
            setattr(
                block.get_submodule(module_name), attribute, nn.Parameter(view, requires_grad=False)
            )

    def _start_next_copy(self) -> None:
        """Start to copy the next block, if there is one, into the slot that has just become free."""
        turn = self._num_started
        if turn == self._end_turn:
            return
        index = turn % len(self._layouts)
        num_bytes = self._layouts[index].num_bytes
        slot_array = self._slots[turn % len(self._slots)][:num_bytes]
        self._num_started += 1
        slot_free_event = _record_event(self._device)

        def copy_block() -> Callable[[], None]:
            array = self._reader.get(turn)[:num_bytes]
            if self._copy_stream is None or slot_free_event is None:
                slot_array.copy_(array)
                self._reader.release(index, lambda: None)
                return lambda: None
            with torch.cuda.stream(self._copy_stream):
                self._copy_stream.wait_event(slot_free_event)
                slot_array.copy_(array, non_blocking=True)
                copied_event = torch.cuda.Event()
                copied_event.record(self._copy_stream)
            self._reader.release(index, copied_event.synchronize)
            return lambda: torch.cuda.current_stream(self._device).wait_event(copied_event)

        self._pending_copies.append(self._copy_thread.submit(copy_block))

    def _wait_before_forward(self, index: int, block: nn.Module, _: object) -> None:
        turn = self._num_started - len(self._pending_copies)
        if turn == self._end_turn:
            raise RuntimeError(
                f"streamed blocks are called once more than the {self._end_turn} times that were announced"
            )
        if (expected_index := turn % len(self._layouts)) != index:
            raise RuntimeError(
                "streamed blocks are called in order: "
                f"block {index} was called in the turn of {expected_index}"
            )
        self._pending_copies.popleft().result()()
        self._bind_to_slot(block, index, turn % len(self._slots))

    def _refill_after_forward(self, *_: object) -> None:
        self._start_next_copy()


@dataclass(frozen=True)
class StreamingOptions:
    """Which blocks' weights are streamed to the device, and from where."""

    list_layers: Callable[[Any], Mapping[str, nn.Module]]
    """Returns a model's blocks by name, in the order in which they are called."""
    from_disk: bool = False
    """Read from disk for each turn, rather than once into host memory."""
    skip_prefixes: tuple[str, ...] = ()
    """Prefixes of the names of other parameters that are not loaded."""
    num_rounds: int | None = None
    """How often all blocks are called, if known: then nothing is read ahead after the last round."""


def stream_blocks(
    blocks: Sequence[nn.Module],
    fill_block: BlockFiller,
    device: torch.device,
    *,
    from_disk: bool,
    num_rounds: int | None = None,
) -> None:
    """Stream the weights of ``blocks``, which are on meta; blocks must be called in order, in rounds.

    ``fill_block`` fills a block's parameters on the host, in threads of its own: once for each block if host
    memory holds them all, at every turn with ``from_disk``. ``num_rounds``: see `StreamingOptions`.
    """
    layouts = [BlockLayout(block) for block in blocks]
    end_turn = None if num_rounds is None else num_rounds * len(blocks)
    reader = BlockReader(
        layouts, fill_block, device, keep_in_memory=not from_disk, end_turn=end_turn
    )
    BlockStreamer(blocks, layouts, reader, device, end_turn)


def _make_thread_pool(device: torch.device, num_threads: int) -> ThreadPoolExecutor:
    """Return threads with this current device: by default they would take memory on the first GPU."""
    if device.type != "cuda":
        return ThreadPoolExecutor(num_threads)
    return ThreadPoolExecutor(num_threads, initializer=torch.cuda.set_device, initargs=(device,))


def allocate_host_array(num_bytes: int, *, pin: bool) -> Tensor:
    """Return a uint8 array on the host, page-locked with ``pin``.

    Locked through the CUDA runtime, because PyTorch's own pinned memory is rounded up to a power of two.
    Raises MemoryError if it cannot be locked.
    """
    array = torch.empty(num_bytes, dtype=torch.uint8)
    if pin:
        runtime, pointer = torch.cuda.cudart(), array.data_ptr()
        error_code = runtime.cudaHostRegister(pointer, num_bytes, _HOST_REGISTER_PORTABLE)
        if int(error_code):
            raise MemoryError(
                f"{num_bytes / 2**30:.2f} GiB of host memory cannot be page-locked "
                f"(CUDA error {int(error_code)}); see ulimit -l"
            )
        weakref.finalize(array.untyped_storage(), runtime.cudaHostUnregister, pointer)
    return array


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event recorded on the current stream; None on devices without streams."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
