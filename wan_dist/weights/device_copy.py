"""Weights from files to a GPU, by several threads and through page-locked buffers.

A copy from pages of a file goes through the driver's own buffer, by one thread: 6 GB/s on an H200's host,
where the link takes 50. Threads that copy into page-locked memory, each into its own, fill it.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from wan_dist.planning.read_memory import NUM_READERS, PINNED_CHUNK_BYTES


class _ChunkBuffers(threading.local):
    """Two page-locked buffers of this thread: while one is being copied, the other is filled."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.copy_events: list[torch.cuda.Event] = []
        self.index = 0

    def take(self) -> Tensor:
        """Return a buffer whose last copy has ended."""
        if len(self.buffers) < 2:
            self.buffers.append(torch.empty(PINNED_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True))
            self.copy_events.append(torch.cuda.Event())
        self.index = (self.index + 1) % 2 if len(self.buffers) == 2 else 0
        self.copy_events[self.index].synchronize()
        return self.buffers[self.index]

    def record_copy(self) -> None:
        """Record that a copy from the last returned buffer has been started."""
        self.copy_events[self.index].record()


_BUFFERS = _ChunkBuffers()


def copy_to_device(source: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of a file on ``device``, itself if it is there."""
    if device.type != "cuda" or source.is_cuda:
        return source.to(device)
    target = torch.empty(source.shape, dtype=source.dtype, device=device)
    source_bytes = source.reshape(-1).view(torch.uint8)
    target_bytes = target.view(-1).view(torch.uint8)
    with torch.cuda.device(device):
        for start in range(0, len(source_bytes), PINNED_CHUNK_BYTES):
            part = source_bytes[start : start + PINNED_CHUNK_BYTES]
            buffer = _BUFFERS.take()[: len(part)]
            np.copyto(buffer.numpy(), part.numpy())  # PyTorch's copy would start its own threads
            target_bytes[start : start + len(part)].copy_(buffer, non_blocking=True)
            _BUFFERS.record_copy()
    return target


def run_readers(
    tasks: Sequence[Callable[[], None]],
    device: torch.device,
    *,
    num_readers: int | None = None,
) -> None:
    """Run tasks that read weights: several at once for a GPU, in order for the CPU; raises the first error.

    ``num_readers``: threads, where it is not by the device.
    """
    if num_readers is None:
        num_readers = NUM_READERS if device.type == "cuda" else 1
    if num_readers == 1:
        for task in tasks:
            task()
        return
    stopped = threading.Event()

    def run_task(task: Callable[[], None]) -> None:
        if stopped.is_set():
            return
        try:
            with torch.no_grad():  # which counts for one thread
                task()
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(num_readers, thread_name_prefix="reader") as executor:
        futures = [executor.submit(run_task, task) for task in tasks]
    for future in futures:
        future.result()
