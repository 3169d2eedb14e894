"""Animate-2's driving video on any ranks: of the model alone, and whole runs."""

import json
from pathlib import Path

import pytest

from tests.conftest import has_golden
from tests.forked import run_ranks
from tests.ranks.driving_worker import CASES
from tests.test_animate_2 import compare, list_settings

SPREADS = [
    ({"ulysses": 2}, False),
    ({"ring": 2}, True),
    ({"ring": 3}, False),
    ({"cfg": 2}, True),
    ({"ring": 2, "ulysses": 2}, False),
]

pytestmark = pytest.mark.skipif(not has_golden("wan2.2-animate-2"), reason="there is no golden")


@pytest.mark.parametrize(("degrees", "is_sharded"), SPREADS)
def test_the_driving_video_steers_on_any_ranks(degrees: dict[str, int], is_sharded: bool) -> None:
    num_ranks = 1
    for degree in degrees.values():
        num_ranks *= degree
    table = json.dumps({"degrees": degrees, "is_sharded": is_sharded})
    first, *_ = run_ranks(num_ranks, "tests.ranks.driving_worker", table)
    assert [line.split()[0] for line in first.stdout.splitlines()] == list(CASES)


@pytest.mark.parametrize(
    ("num_ranks", "spread"),
    [
        (2, "parallel.ulysses=2 fsdp.dit=true"),
        (2, "parallel.cfg=2 memory.dit=stream"),
        (3, "parallel.ring=3 memory.slice_tokens=31"),
    ],
)
def test_any_spread_gives_the_releases_video(num_ranks: int, spread: str, tmp_path: Path) -> None:
    settings = [*list_settings("release"), f"output.dir={tmp_path}", *spread.split()]
    run_ranks(num_ranks, "wan_dist.run", *settings)
    compare("release", str(tmp_path / "out.safetensors"))
