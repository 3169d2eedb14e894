"""Sweeps: groups of videos that differ in one setting or in two, as grids to compare side by side."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.records import GalleryVideo, make_natural_key

_MAX_CELLS = 64
_MAX_PAIRED_SETTINGS = 8
"""Settings that are tried in pairs."""
_MAX_SWEEPS = 300
_MIN_FILLED_FRACTION = 0.8


@dataclass(frozen=True)
class Sweep:
    """A grid of videos that differ only in the settings ``row_setting`` and ``column_setting``."""

    row_setting: str
    """Empty where one setting varies."""
    column_setting: str
    row_values: tuple[str, ...]
    column_values: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]
    """Indices of records by row and column, None for an empty cell."""

    @property
    def record_indices(self) -> frozenset[int]:
        """Indices of all records in the grid."""
        return frozenset(
            record_index for row in self.cells for record_index in row if record_index is not None
        )


def find_sweeps(records: Sequence[GalleryVideo]) -> list[Sweep]:
    """Return the sweeps of the records that have a video, largest first; none is a subset of another."""
    settings_by_record = {
        record_index: {
            key: format_setting_value(value) for key, value in record.result_settings.items()
        }
        for record_index, record in enumerate(records)
        if record.video
    }
    keys = list(
        dict.fromkeys(
            key for record_settings in settings_by_record.values() for key in record_settings
        )
    )
    varying_keys = [
        key
        for key in keys
        if len({record_settings.get(key, "") for record_settings in settings_by_record.values()})
        > 1
    ]
    values_by_record = {
        record_index: [record_settings.get(key, "") for key in varying_keys]
        for record_index, record_settings in settings_by_record.items()
    }
    groups_by_setting = {
        setting_index: list(_group_similar_records(values_by_record, (setting_index,)))
        for setting_index in range(len(varying_keys))
    }
    paired_settings = sorted(
        (setting_index for setting_index in groups_by_setting if groups_by_setting[setting_index]),
        key=lambda setting_index: -sum(map(len, groups_by_setting[setting_index])),
    )[:_MAX_PAIRED_SETTINGS]
    candidate_sweeps = [
        _build_sweep(varying_keys, values_by_record, setting_pair, group)
        for setting_pair in itertools.combinations(sorted(paired_settings), 2)
        for group in _group_similar_records(values_by_record, setting_pair)
    ]
    candidate_sweeps += [
        _build_sweep(varying_keys, values_by_record, (setting_index,), group)
        for setting_index in paired_settings
        for group in groups_by_setting[setting_index]
    ]
    return _select_maximal_sweeps(sweep for sweep in candidate_sweeps if sweep is not None)


def format_setting_value(value: object) -> str:
    """Return a setting's value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _group_similar_records(
    values_by_record: dict[int, list[str]], setting_indices: tuple[int, ...]
) -> Iterable[list[int]]:
    """Yield groups of records that are equal in all other settings, and vary in each of these."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for record_index, record_values in values_by_record.items():
        groups[
            tuple(
                "" if setting_index in setting_indices else value
                for setting_index, value in enumerate(record_values)
            )
        ].append(record_index)
    for group in groups.values():
        if all(
            len({values_by_record[record_index][setting_index] for record_index in group}) > 1
            for setting_index in setting_indices
        ):
            yield group


def _build_sweep(
    varying_keys: list[str],
    values_by_record: dict[int, list[str]],
    setting_indices: tuple[int, ...],
    record_group: list[int],
) -> Sweep | None:
    """Return a group as a grid, of one row for one setting; None for too many cells or too many gaps."""
    sorted_values = {
        setting_index: _sort_setting_values(
            values_by_record[record_index][setting_index] for record_index in record_group
        )
        for setting_index in setting_indices
    }
    row_index, column_index = _choose_axes(varying_keys, sorted_values)
    if row_index is None and varying_keys[column_index] == "prompt":
        return None  # videos of different prompts alone show different things: nothing to compare
    record_by_cell = {
        (
            "" if row_index is None else values_by_record[record_index][row_index],
            values_by_record[record_index][column_index],
        ): record_index
        for record_index in record_group
    }  # of several records in one cell, the last counts
    if row_index is not None:
        record_by_cell = _drop_single_lines(record_by_cell)
    used_rows = {row for row, _ in record_by_cell}
    used_columns = {column for _, column in record_by_cell}
    row_values = (
        [""]
        if row_index is None
        else [value for value in sorted_values[row_index] if value in used_rows]
    )
    column_values = [value for value in sorted_values[column_index] if value in used_columns][
        :_MAX_CELLS
    ]
    num_cells = len(row_values) * len(column_values)
    has_gaps = row_index is not None and len(record_by_cell) < _MIN_FILLED_FRACTION * num_cells
    if not record_by_cell or num_cells > _MAX_CELLS or has_gaps:
        return None
    return Sweep(
        "" if row_index is None else varying_keys[row_index],
        varying_keys[column_index],
        tuple(row_values),
        tuple(column_values),
        tuple(
            tuple(record_by_cell.get((row, column)) for column in column_values)
            for row in row_values
        ),
    )


def _choose_axes(
    varying_keys: list[str], sorted_values: dict[int, list[str]]
) -> tuple[int | None, int]:
    """Return the settings of rows and of columns, of ``sorted_values`` by setting; no rows for one setting.

    Prompts label the rows, as they are long; else the setting with more values does.
    """
    *row_indices, column_index = sorted(
        sorted_values,
        key=lambda setting_index: (
            varying_keys[setting_index] != "prompt",
            -len(sorted_values[setting_index]),
        ),
    )
    return (row_indices[0] if row_indices else None), column_index


def _drop_single_lines(record_by_cell: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return the cells without rows and columns of a single video."""
    while True:
        row_counts, column_counts = (
            Counter(row for row, _ in record_by_cell),
            Counter(column for _, column in record_by_cell),
        )
        dense_cells = {
            cell: record_index
            for cell, record_index in record_by_cell.items()
            if row_counts[cell[0]] > 1 and column_counts[cell[1]] > 1
        }
        if len(dense_cells) == len(record_by_cell):
            return dense_cells
        record_by_cell = dense_cells


def _sort_setting_values(values: Iterable[str]) -> list[str]:
    def make_sort_key(value: str) -> tuple[int, float, list[tuple[int, int, str]]]:
        try:
            return 0, float(value), []
        except ValueError:
            return 1, 0.0, make_natural_key(value)

    return sorted(set(values), key=make_sort_key)


def _select_maximal_sweeps(sweeps: Iterable[Sweep]) -> list[Sweep]:
    maximal_sweeps: list[Sweep] = []
    groups_by_record: dict[int, list[frozenset[int]]] = defaultdict(list)
    for sweep in sorted(sweeps, key=lambda sweep: -len(sweep.record_indices)):
        record_indices = sweep.record_indices
        if len(record_indices) < 2 or any(
            record_indices <= larger_group for larger_group in groups_by_record[min(record_indices)]
        ):
            continue
        maximal_sweeps.append(sweep)
        for record_index in record_indices:
            groups_by_record[record_index].append(record_indices)
    return maximal_sweeps[:_MAX_SWEEPS]
