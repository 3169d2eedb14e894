"""The README shows what is in bench/results; results are kept with the run that they are of."""

import json
from pathlib import Path

from bench import table
from bench.record import Record

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_steps_is_made_from_the_results() -> None:
    assert "\n".join(table.lines()) in README.read_text()


def test_a_row_measured_again_replaces_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    first = Record(file, ["what"])
    first.add({"what": "ours", "seconds": 2})
    first.add({"what": "theirs", "seconds": 3})
    Record(file, ["what"]).add({"what": "ours", "seconds": 1})
    found = json.loads(file.read_text())
    assert found["rows"] == [
        {"what": "theirs", "seconds": 3, "run": 1},
        {"what": "ours", "seconds": 1, "run": 2},
    ]
    assert len(found["runs"]) == 2
    assert {"gpu", "gpus", "versions", "commit", "date"} == set(found["runs"][0])
