"""Rank arithmetic for up to 64 ranks in one process: PyTorch's fake process group stands for the others."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from wan_dist.parallel.mesh import Axis, make_process_groups, select_local_device
from wan_dist.parallel.sequence import SplitSequence
from wan_dist.parallel.team import Coordinator
from wan_dist.planning.degrees import Degrees
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.errors import InputError

SPREADS = [
    Degrees(dp=1, cfg=2, ring=1, ulysses=4),
    Degrees(dp=2, cfg=2, ring=2, ulysses=8),
    Degrees(dp=4, cfg=2, ring=2, ulysses=4),
    Degrees(cfg=1, ring=7),
    Degrees(dp=3, cfg=2, ring=1, ulysses=5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("degrees", SPREADS, ids=str)
def test_groups_are_neighbours_from_ulysses_outwards(degrees: Degrees) -> None:
    size = degrees.ranks_per_replica
    for rank in {0, 1, degrees.num_ranks // 2, degrees.num_ranks - 1}:
        coordinator = Coordinator(RankLayout(), 60)
        coordinator.rank = rank
        groups = make_process_groups(degrees, coordinator, torch.device("cpu"), 60)
        within = rank % size
        rest, ulysses = divmod(rank, degrees.ulysses)
        rest, ring = divmod(rest, degrees.ring)
        dp, cfg = divmod(rest, degrees.cfg)
        assert (groups.dp.rank, groups.cfg.rank, groups.ring.rank, groups.ulysses.rank) == (
            dp,
            cfg,
            ring,
            ulysses,
        )
        assert groups.sp.rank == ring * degrees.ulysses + ulysses
        assert groups.replica.rank == within == list(groups.replica_ranks).index(rank)
        dist.init_process_group("fake", store=FakeStore(), rank=within, world_size=size)
        try:
            groups.create_axis_groups()
            strides = {"ulysses": 1, "ring": degrees.ulysses, "cfg": degrees.ulysses * degrees.ring}
            for name, stride in strides.items():
                axis = getattr(groups, name)
                if axis.size > 1:
                    members = dist.get_process_group_ranks(axis.group)
                    assert members == [within + (i - axis.rank) * stride for i in range(axis.size)]
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("num_tokens", [1, 5, 45, 64, 97])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 64])
def test_shares_are_the_sequence(num_tokens: int, num_ranks: int) -> None:
    """Every token is in one share, in order; rotary rows go with their tokens; segments count what
    is there.
    """
    tokens = torch.arange(1, num_tokens + 1.0).view(1, -1, 1)
    table = torch.arange(1, num_tokens + 1.0).view(-1, 1, 1)
    first = num_tokens // 3
    segments = (num_tokens,) if first == 0 else (first, num_tokens - first)
    seen, counted = [], []
    for rank in range(num_ranks):
        sequence = SplitSequence(Axis(rank, num_ranks))
        x, (cos, sin), parts = sequence.split(tokens, (table, table), segments)
        assert x.shape[1] == len(cos) == len(sin) == sum(parts) == sequence.tokens_per_rank
        assert torch.equal(x.flatten(), cos.flatten())
        num_valid = sequence.count_valid_tokens(rank, 1)
        assert bool((x[:, num_valid:] == 0).all())
        seen += x[0, :num_valid, 0].tolist()
        counted += [row for row, count in enumerate(parts) for _ in range(count)][:num_valid]
    assert seen == tokens.flatten().tolist()
    assert counted == [row for row, count in enumerate(segments) for _ in range(count)]


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "taken"), [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 3, 0)]
)
def test_each_rank_takes_its_own_gpu_or_the_only_one(
    num_gpus: int, local_rank: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _start_rank(local_rank, num_gpus, monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert select_local_device("cuda") == torch.device("cuda", taken)


def test_a_rank_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _start_rank(2, 2, monkeypatch)
    with pytest.raises(InputError, match="LOCAL_RANK=2: rank 2 sees 2 GPUs"):
        select_local_device("cuda")
    assert select_local_device("cpu").type == "cpu"


def _start_rank(local_rank: int, num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    rank = str(local_rank)
    for key, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(key, value)
