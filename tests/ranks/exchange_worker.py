"""One rank of the check that what ranks exchange may have any layout, dtype and size; the layouts
differ between the ranks too.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wan_dist.parallel.collectives import (
    all_gather,
    all_to_all,
    broadcast,
    exchange_halos,
    gather_on_first_rank,
    send_to_next,
)
from wan_dist.parallel.mesh import Axis, open_process_groups
from wan_dist.parallel.sequence import SplitSequence
from wan_dist.parallel.vae_split import make_split_video_state
from wan_dist.planning.degrees import Degrees

CPU = torch.device("cpu")
DTYPES = (
    *(
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
    ),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
SHAPES = ((2, 3, 4, 6, 5), (2, 3, 1, 2, 2), (2, 0, 4, 6, 5), (2, 1, 1, 1, 1))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(1, 4).contiguous().transpose(1, 4),
    "permuted": lambda x: x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
    "a slice": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
    "with an offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str, rank: int) -> Tensor:
    """Return what a rank sends, in one of the layouts."""
    x = ((torch.arange(torch.Size(shape).numel()) * (2 * rank + 3) + rank) % 7).view(shape)
    return LAYOUTS[layout](x.to(dtype))


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    found_values, expected_values = (x if x.is_complex() else x.double() for x in (found, expected))
    return (found.dtype, found.device) == (expected.dtype, expected.device) and torch.equal(
        found_values, expected_values
    )


def wrong(x: Tensor, other: Tensor, axis: Axis) -> Iterator[str]:
    """Yield the functions that bring something wrong to this rank, which has x, of two ranks; the
    other has ``other``.
    """
    first, second = (x, other) if axis.rank == 0 else (other, x)
    yield from ["all_to_all"] * (
        not same(all_to_all(x, axis)(), torch.stack([first[axis.rank], second[axis.rank]]))
    )
    yield from ["all_gather"] * (not same(all_gather(x, axis), torch.stack([first, second])))
    yield from ["send_to_next"] * (
        not all(map(same, send_to_next([x, x[:1]], axis)(), [other, other[:1]]))
    )
    edges = exchange_halos(x[:1], x[1:], axis)()
    yield from ["exchange_halos"] * (
        not all(map(same, edges, [None, second[:1]] if axis.rank == 0 else [first[1:], None]))
    )
    for dim in (1, 3):
        mine = x if axis.rank == 0 else x.narrow(dim, 0, x.shape[dim] // 2)
        expected = (
            torch.cat([first, second.narrow(dim, 0, x.shape[dim] // 2)], dim)
            if axis.rank == 0
            else None
        )
        found = gather_on_first_rank(mine, [x.shape[dim], x.shape[dim] // 2], dim, axis)
        yield from ["gather_on_first_rank"] * (not same(found, expected))
    yield from ["broadcast"] * (
        not same(broadcast(x if axis.rank == 0 else None, axis, CPU), first)
    )


def wrong_callers(x: Tensor, other: Tensor, axis: Axis) -> Iterator[str]:
    """Yield those that hand tensors to these functions, and get something wrong."""
    state = make_split_video_state(axis, 4, 5 * axis.size)
    state.shard_lengths = [x.shape[4]] * axis.size
    expected = torch.cat([x, other] if axis.rank == 0 else [other, x], dim=4)
    yield from ["SplitState.whole"] * (not same(state.gather_whole(x), expected))
    edge = other.narrow(4, 0 if axis.rank == 0 else x.shape[4] - 1, 1)
    found = state.attach_halos(x, 1)
    yield from ["SplitState.trade"] * (
        not same(found, torch.cat([x, edge] if axis.rank == 0 else [edge, x], dim=4))
    )
    sequence = SplitSequence(axis)
    sequence.num_tokens = 2 * axis.size - 1
    tokens, others = (
        x[:1].flatten(1)[:, :6].view(1, 2, -1),
        other[:1].flatten(1)[:, :6].view(1, 2, -1),
    )
    whole = torch.cat([tokens, others] if axis.rank == 0 else [others, tokens], dim=1)[
        :, : sequence.num_tokens
    ]
    yield from ["SplitSequence.gather"] * (not same(sequence.gather(tokens), whole))


def main() -> None:
    with open_process_groups(Degrees(ulysses=2), CPU, timeout_seconds=60) as groups:
        axis, other_rank, num_cases = groups.ulysses, 1 - groups.rank, 0
        cases = itertools.chain(
            itertools.product(
                SHAPES, DTYPES, zip(LAYOUTS, [*list(LAYOUTS)[1:], "contiguous"], strict=True)
            ),
            itertools.product(SHAPES, DTYPES[3:5], ((layout, layout) for layout in LAYOUTS)),
        )
        for shape, dtype, layouts in cases:
            x, other = (
                values(shape, dtype, layouts[rank], rank) for rank in (groups.rank, other_rank)
            )
            found = list(wrong(x, other, axis))
            assert not found, (shape, dtype, layouts, found)
            if shape == SHAPES[0]:
                found = list(wrong_callers(x, other, axis))
                assert not found, (shape, dtype, layouts, found)
            num_cases += 1
        for x in (torch.tensor(3.5 + groups.rank), torch.tensor(groups.rank == 0)):  # of no dims
            assert all_gather(x, axis).shape == (2,)
            assert same(
                broadcast(x, axis, CPU),
                torch.tensor(3.5) if x.dtype == torch.float32 else torch.tensor(True),
            )
        if groups.rank == 0:
            print(f"{num_cases} cases")


if __name__ == "__main__":
    main()
