"""The plan against the GPU peaks that bench/memory.py has recorded on GPUs: every stage of every
arrangement, within 10 %.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.plan_table import plan_peaks

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
ROWS = [
    row
    for file in sorted(RESULTS.glob("memory-*.json"))
    for row in json.loads(file.read_text())["rows"]
]


def test_there_are_enough_arrangements() -> None:
    assert len(ROWS) >= 20
    assert len({row["row"].split()[0] for row in ROWS}) == 4
    assert {row["ranks"] for row in ROWS} >= {1, 2}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['ranks']} {row['row']}")
def test_gpu_peaks_are_what_is_planned(row: dict[str, Any]) -> None:
    planned = plan_peaks(row)
    for stage, entry in row["memory"].items():
        if stage in row.get("ran_out", ()):
            continue  # its peak is of the next way
        seen = entry["peak_gpu_gib"]
        print(
            f"{row['ranks']} {row['row']}: {stage} planned {planned[stage]:.2f}, "
            f"seen {seen:.2f} GiB ({planned[stage] / seen - 1:+.0%})"
        )
        assert planned[stage] == pytest.approx(seen, rel=0.1)
