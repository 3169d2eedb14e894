"""The docs show what is in bench/results, in the schema and in the plan; results are kept with the run
that they are of.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.record import Record
from bench.table import PAGES, RESULTS, TABLES, fill_tables

TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[set[str]]:
    """Make each table once, and note the files of results that are read for them."""
    names, load = set[str](), table._load

    def load_and_note(name: str) -> dict[str, Any]:
        names.add(name)
        return load(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_load", load_and_note)
        for name, make_lines in TABLES.items():
            patch.setitem(TABLES, name, cache(make_lines))
        yield names


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_made_from_the_results(page: str) -> None:
    """If not, `python -m bench.table --write` makes them."""
    assert fill_tables(TEXTS[page]) == TEXTS[page]


def test_every_table_is_shown() -> None:
    shown = [name for text in TEXTS.values() for name in re.findall(r"<!-- table: (\w+) -->", text)]
    assert set(shown) == set(TABLES)
    assert sum(text.count("<!-- end -->") for text in TEXTS.values()) == len(shown)


def test_a_table_that_is_old_is_replaced() -> None:
    old = "before\n<!-- table: drills -->\n\nold\n\n<!-- end -->\nafter\n"
    new = fill_tables(old)
    assert "old" not in new
    assert TABLES["drills"]()[-1] in new
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert fill_tables(new) == new


def test_every_file_of_results_is_in_a_table(loaded: set[str]) -> None:
    for make_lines in TABLES.values():
        make_lines()
    assert loaded == {file.stem for file in RESULTS.glob("*.json")}


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
