"""Videos that differ in one setting, or in two: what can be laid side by side."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.fields import natural
from wan_dist.output.gallery.records import Record

_MOST_CELLS = 64
_MOST_SETTINGS = 8
"""That are tried in pairs."""
_MOST_SWEEPS = 300
_LEAST_FILLED = 0.8


@dataclass(frozen=True)
class Sweep:
    """A grid of videos that differ in nothing but the settings ``rows`` and ``columns``."""

    rows: str
    """Empty where one setting varies."""
    columns: str
    row_values: tuple[str, ...]
    column_values: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]
    """Numbers of records, by row and column."""

    @property
    def numbers(self) -> frozenset[int]:
        """All of them."""
        return frozenset(number for row in self.cells for number in row if number is not None)


def find_sweeps(records: Sequence[Record]) -> list[Sweep]:
    """Return the sweeps among the videos that are there, the largest first; none is a part of another."""
    recipes = {number: {key: shown(value) for key, value in record.recipe.items()} for number, record in enumerate(records) if record.video}
    keys = list(dict.fromkeys(key for recipe in recipes.values() for key in recipe))
    varying = [key for key in keys if len({recipe.get(key, "") for recipe in recipes.values()}) > 1]
    values = {number: [recipe.get(key, "") for key in varying] for number, recipe in recipes.items()}
    singles = {place: list(_groups(values, (place,))) for place in range(len(varying))}
    tried = sorted((place for place in singles if singles[place]), key=lambda place: -sum(map(len, singles[place])))[:_MOST_SETTINGS]
    found = [_sweep(varying, values, pair, group) for pair in itertools.combinations(sorted(tried), 2) for group in _groups(values, pair)]
    found += [_sweep(varying, values, (place,), group) for place in tried for group in singles[place]]
    return _largest(sweep for sweep in found if sweep is not None)


def shown(value: object) -> str:
    """Return a setting's value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _groups(values: dict[int, list[str]], places: tuple[int, ...]) -> Iterable[list[int]]:
    """Yield the videos that are equal but for what is in these places, and are not all equal there."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, own in values.items():
        groups[tuple("" if place in places else value for place, value in enumerate(own))].append(number)
    for group in groups.values():
        if all(len({values[number][place] for number in group}) > 1 for place in places):
            yield group


def _sweep(varying: list[str], values: dict[int, list[str]], places: tuple[int, ...], group: list[int]) -> Sweep | None:
    """Return a group as a grid, of one row where one setting varies; None where it would have too many cells or too many gaps."""
    ordered = {place: _ordered(values[number][place] for number in group) for place in places}
    *downs, across = sorted(places, key=lambda place: (varying[place] != "prompt", -len(ordered[place])))  # prompts beside the rows
    down = downs[0] if downs else None
    at = {("" if down is None else values[number][down], values[number][across]): number for number in group}  # the last counts
    if down is not None:
        at = _dense(at)
    in_rows, in_columns = {row for row, _ in at}, {column for _, column in at}
    rows = [""] if down is None else [value for value in ordered[down] if value in in_rows]
    columns = [value for value in ordered[across] if value in in_columns][:_MOST_CELLS]
    num_cells = len(rows) * len(columns)
    if down is None and varying[across] == "prompt":
        return None  # they show something else each
    if not at or num_cells > _MOST_CELLS or (down is not None and len(at) < _LEAST_FILLED * num_cells):
        return None
    cells = tuple(tuple(at.get((row, column)) for column in columns) for row in rows)
    return Sweep("" if down is None else varying[down], varying[across], tuple(rows), tuple(columns), cells)


def _dense(at: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return the grid without rows and columns of a single video."""
    while True:
        in_row, in_column = Counter(row for row, _ in at), Counter(column for _, column in at)
        kept = {place: number for place, number in at.items() if in_row[place[0]] > 1 and in_column[place[1]] > 1}
        if len(kept) == len(at):
            return kept
        at = kept


def _ordered(values: Iterable[str]) -> list[str]:
    def order(value: str) -> tuple[int, float, list[tuple[int, int, str]]]:
        try:
            return 0, float(value), []
        except ValueError:
            return 1, 0.0, natural(value)

    return sorted(set(values), key=order)


def _largest(sweeps: Iterable[Sweep]) -> list[Sweep]:
    kept: list[Sweep] = []
    seen: dict[int, list[frozenset[int]]] = defaultdict(list)
    for sweep in sorted(sweeps, key=lambda sweep: -len(sweep.numbers)):
        numbers = sweep.numbers
        if len(numbers) < 2 or any(numbers <= other for other in seen[min(numbers)]):
            continue
        kept.append(sweep)
        for number in numbers:
            seen[number].append(numbers)
    return kept[:_MOST_SWEEPS]
