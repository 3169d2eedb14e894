"""What ranks send to each other arrives as it is, whatever its strides, dtype and size."""

import torch

from tests.forked import run_ranks
from wan_dist.parallel.collectives import (
    all_gather,
    all_to_all,
    broadcast,
    exchange_halos,
    gather_on_first_rank,
    send_to_next,
)
from wan_dist.parallel.mesh import Axis


def test_any_tensor_arrives_as_it_is() -> None:
    first, _ = run_ranks(2, "tests.ranks.exchange_worker")
    assert "392 cases" in first.stdout


def test_a_rank_alone_gets_what_it_has() -> None:
    x, alone = torch.randn(2, 3).t(), Axis()
    assert all_to_all(x, alone)() is x
    assert torch.equal(all_gather(x, alone), x[None])
    assert send_to_next([x], alone)()[0] is x
    assert exchange_halos(x, x, alone)() == (None, None)
    assert gather_on_first_rank(x, [3], 0, alone) is x
    assert broadcast(x, alone, torch.device("cpu")) is x
    assert broadcast(None, alone, torch.device("cpu")) is None
