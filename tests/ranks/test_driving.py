"""Animate-2's driving video on any ranks, of the model alone."""

import json

import pytest

from tests.conftest import has_golden
from tests.forked import run_ranks
from tests.ranks.driving_worker import CASES

SPREADS = [
    ({"ulysses": 2}, False),
    ({"ring": 2}, True),
    ({"ring": 3}, False),
    ({"cfg": 2}, True),
    ({"ring": 2, "ulysses": 2}, False),
]


@pytest.mark.skipif(not has_golden("wan2.2-animate-2"), reason="there is no golden")
@pytest.mark.parametrize(("degrees", "is_sharded"), SPREADS)
def test_the_driving_video_steers_on_any_ranks(degrees: dict[str, int], is_sharded: bool) -> None:
    num_ranks = 1
    for degree in degrees.values():
        num_ranks *= degree
    table = json.dumps({"degrees": degrees, "is_sharded": is_sharded})
    first, *_ = run_ranks(num_ranks, "tests.ranks.driving_worker", table)
    assert [line.split()[0] for line in first.stdout.splitlines()] == list(CASES)
