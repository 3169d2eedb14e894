"""Blocks whose weights visit the device in turn compute what resident ones compute, whatever their number."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from wan_dist.weights.streaming import BlockReader, stream_blocks

CPU = torch.device("cpu")


class Blocks(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, dtype=torch.float32))
            for _ in range(number)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def streamed(
    model: Blocks, *, from_disk: bool, num_rounds: int | None = None
) -> tuple[Blocks, list[int]]:
    """Return a model whose blocks are on meta until their turn, and the list of blocks as they are read."""
    with torch.device("meta"):
        other = Blocks(len(model.blocks))
    reads: list[int] = []

    def read(index: int, parameters: dict[str, Tensor]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        reads.append(index)
        for name, value in model.blocks[index].named_parameters():
            parameters[name].copy_(value)

    stream_blocks(list(other.blocks), read, CPU, from_disk=from_disk, num_rounds=num_rounds)
    return other, reads


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("from_disk", [False, True])
@torch.no_grad()
def test_streamed_blocks_are_the_resident_ones(number: int, from_disk: bool) -> None:
    model = Blocks(number)
    other, reads = streamed(model, from_disk=from_disk)
    for _ in range(4):
        x = torch.randn(3, 6)
        assert torch.equal(other(x), model(x))
    assert set(reads) == set(range(number))
    assert (len(reads) > number) == from_disk
    places = {parameter.untyped_storage().data_ptr() for parameter in other.parameters()}
    assert len(places) == min(2, number)  # two blocks are on the device, however many there are


@pytest.mark.parametrize("number", [1, 2, 5])
@torch.no_grad()
def test_nothing_is_read_after_the_last_round(number: int) -> None:
    other, reads = streamed(Blocks(number), from_disk=True, num_rounds=2)
    for _ in range(2):
        other(torch.ones(1, 6))
    threading.Event().wait(0.1)
    assert sorted(reads) == sorted(2 * list(range(number)))
    with pytest.raises(RuntimeError, match="once more than"):
        other(torch.ones(1, 6))


@torch.no_grad()
def test_an_error_while_reading_is_not_lost() -> None:
    def read(index: int, parameters: dict[str, Tensor]) -> None:
        if index == 2:
            raise OSError("the disk is gone")
        for value in parameters.values():
            value.zero_()

    with torch.device("meta"):
        model = Blocks(4)
    stream_blocks(list(model.blocks), read, CPU, from_disk=True)
    with pytest.raises(OSError, match="the disk is gone"):
        model(torch.ones(1, 6))


@torch.no_grad()
def test_blocks_out_of_turn_are_refused() -> None:
    model = Blocks(4)
    other, _ = streamed(model, from_disk=False)
    other.blocks[0](torch.ones(1, 6))
    with pytest.raises(RuntimeError, match="block 2 was called in the turn of 1"):
        other.blocks[2](torch.ones(1, 6))


def test_little_is_read_ahead() -> None:
    model = Blocks(10)
    reads = streamed(model, from_disk=False)[1]
    threading.Event().wait(0.2)
    assert len(reads) <= 2 + BlockReader.num_ahead


@torch.no_grad()
@pytest.mark.parametrize("from_disk", [False, True])
def test_buffers_are_freed_with_the_model(from_disk: bool) -> None:
    model = Blocks(4)
    other, _ = streamed(model, from_disk=from_disk)
    other(torch.ones(1, 6))
    streamer = weakref.ref(next(iter(other.blocks[0]._forward_hooks.values())).__self__)
    gc.collect()
    gc.disable()
    try:
        del other
        for _ in range(100):  # a read may be under way
            if streamer() is None:
                return
            threading.Event().wait(0.01)
        pytest.fail("it is still there")
    finally:
        gc.enable()
