"""Job file parser: entries with their lines, from one prompt a line, JSON objects, or the rows of a table.

Imports no torch.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_dist.config.schema import list_settings
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file

KEY_ALIASES = {
    "name": "output.name",
    "steps": "sample.steps",
    "solver": "sample.solver",
    "shift": "sample.shift",
    "guide_scale": "sample.guide_scale",
    "frames": "frame_num",
}
"""Short names of settings in job files."""

JobEntry = tuple[int, dict[str, object]]
"""Line number, from 1, and the settings there by key."""

_MAX_FILE_BYTES = 64 * 2**20
_SUPPORTED_FORMATS = (
    "a prompt a line (.txt, .prompts or no suffix), "
    "JSON objects (.jsonl, .ndjson or .json) or a table (.csv or .tsv)"
)
_CONVERSION_HINTS = {
    "save it as .csv": (".xlsx", ".xls", ".xlsm", ".ods", ".numbers", ".parquet", ".feather"),
    "save it as plain text, .txt": (".docx", ".doc", ".odt", ".rtf", ".pages", ".pdf"),
    "unpack it": (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar"),
}
_FOREIGN_FORMATS = {
    "version https://git-lfs": "a Git LFS pointer: fetch the file with `git lfs pull`",
    "<!doctype html": "a page of HTML, as a failed download leaves: download it again",
    "<html": "a page of HTML, as a failed download leaves: download it again",
    "<?xml": "XML: save it as .csv or .jsonl",
    "{\\rtf": "rich text (RTF): save it as plain text",
    "%pdf-": "a PDF: save it as plain text",
}
_JSON_START_PATTERN = re.compile(r'\[?\s*\{\s*"[^"]*"\s*:|[\[{]\s*\Z|\[\s*"[^"]*"\s*[,\]]\s*("|\Z)')
"""Beginning of the first line of JSON, which few prompts have."""
_NULL_CELLS = ("NaN", "nan", "<NA>", "#N/A", "NaT")
"""What programs write for an empty cell."""
_MAX_FLOAT_DIGITS = 15
"""Digits of a whole number that was written as a float: a float does not hold more exactly."""


def read_entries(file: Path) -> Iterator[JobEntry]:
    """Return the entries of a file, whose suffix says the format.

    Raises InputError, with the line, for what cannot be read, and for unknown suffixes.
    """
    reader_by_suffix = {
        "": _parse_prompts,
        ".txt": _parse_prompts,
        ".prompts": _parse_prompts,
        ".jsonl": _parse_json_lines,
        ".ndjson": _parse_json_lines,
        ".json": _parse_json,
    }
    reader_by_suffix |= {".csv": _parse_table, ".tsv": _parse_table}
    if (suffix := file.suffix.lower()) not in reader_by_suffix:
        hint = next(
            (hint for hint, suffixes in _CONVERSION_HINTS.items() if suffix in suffixes),
            "save it as one of these, or rename it if it is one",
        )
        raise InputError(
            f"{file} cannot be read as a job file: it is {suffix}, "
            f"and supported are {_SUPPORTED_FORMATS}; {hint}"
        )
    try:
        # byte order marks also inside the text, where files were concatenated
        text = re.sub(
            "^\ufeff", "", read_text_file(file, max_bytes=_MAX_FILE_BYTES), flags=re.MULTILINE
        )
    except UnreadableFileError as error:
        raise InputError(f"{file} cannot be read as a job file: {error}") from None
    text_start = text[:100].lstrip().lower()
    if foreign_format := next(
        (
            format_name
            for prefix, format_name in _FOREIGN_FORMATS.items()
            if text_start.startswith(prefix)
        ),
        None,
    ):
        raise InputError(f"{file} cannot be read as a job file: it is {foreign_format}")
    return reader_by_suffix[suffix](text, file)


def _parse_prompts(text: str, file: Path) -> Iterator[JobEntry]:
    """Yield each line as a prompt, unchanged; ``@FILE.txt`` names a file that contains the prompt."""
    first_line = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if detected_format := _detect_other_format(first_line):
        hint = 'a prompt that looks so can be written in .jsonl, as {"prompt": "..."}'
        raise InputError(
            f"{file} has the suffix of one prompt per line, but begins as a {detected_format} file does: "
            f"{first_line[:60]}; rename it ({hint})"
        )
    for line_number, line in enumerate(text.split("\n"), 1):
        if prompt := line.strip():
            is_plain_at = prompt.startswith("@") and not re.fullmatch(
                r"@[^@].*\.txt", prompt, re.IGNORECASE
            )
            yield line_number, {"prompt": f"@{prompt}" if is_plain_at else prompt}


def _detect_other_format(first_line: str) -> str | None:
    """Return the suffix of the format that a file of prompts seems to be of instead, None for prompts."""
    if _JSON_START_PATTERN.match(first_line):
        return ".jsonl or .json"
    return ".csv" if _is_table_header(first_line) else None


def _is_table_header(line: str) -> bool:
    """Whether a line is the header of a table: two or more keys of settings."""
    keys = [key.strip(' "') for key in line.split(_detect_delimiter(line))]
    return len(keys) > 1 and all(key in KEY_ALIASES or key in list_settings() for key in keys)


def _parse_json_lines(text: str, file: Path) -> Iterator[JobEntry]:
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(
                line, object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant
            )
        except (ValueError, RecursionError) as error:
            hint = (
                "; an array, or objects over several lines, are read from .json"
                if line.strip() in ("[", "{", "[{")
                else ""
            )
            raise InputError(f"{file}, line {line_number}: not JSON ({error}){hint}") from None
        yield line_number, _convert_object(entry, file, line_number)


def _parse_json(text: str, file: Path) -> Iterator[JobEntry]:
    """Yield the objects of an array, one object, or one object a line, as some .json files are."""
    decoder = json.JSONDecoder(
        object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant
    )
    if not text.strip():
        return
    try:
        content = decoder.decode(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(
                f"{file}, line {error.lineno}: not JSON ({error.msg}: column {error.colno})"
            ) from None
        yield from _parse_json_lines(text, file)
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    counted_position, position, line_number = (
        0,
        text.index("[") + 1 if isinstance(content, list) else 0,
        1,
    )
    for entry in content if isinstance(content, list) else [content]:
        position = next(
            index for index in range(position, len(text)) if text[index] not in " \t\n,"
        )
        line_number += text.count("\n", counted_position, position)
        yield line_number, _convert_object(entry, file, line_number)
        counted_position, (_, position) = position, decoder.raw_decode(text, position)


def _convert_object(entry: object, file: Path, line_number: int) -> dict[str, object]:
    if not isinstance(entry, dict):
        raise InputError(
            f"{file}, line {line_number}: not an object of settings, "
            'such as {"prompt": "two cats boxing", "seed": 7}'
        )
    return {
        key: _convert_whole_number(key, value)
        for key, value in entry.items()
        if value is not None or _allows_null(key)
    }


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value_by_key = dict(pairs)
    if len(value_by_key) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return value_by_key


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number; leave the key out, or write null")


def _parse_table(text: str, file: Path) -> Iterator[JobEntry]:
    """Yield the rows of a table as settings by the keys of its first row.

    The delimiter is the one found between those keys, unless a line ``sep=`` before them gives it.
    """
    first_line = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = _detect_delimiter(first_line, is_tabbed=file.suffix.lower() == ".tsv")
    # Excel writes a line such as "sep=;" before the keys
    if separator_match := re.fullmatch(
        r"""\s*"?sep=([^\w\s"']|\t)"?\s*""", first_line, re.IGNORECASE
    ):
        delimiter, text = separator_match[1], text.replace(first_line, "", 1)
    keys: list[str] = []
    for line_number, row in _split_table_rows(text, file, delimiter):
        if not any(cell.strip() for cell in row):
            continue
        if not keys:
            keys = _read_table_keys(row, file, line_number)
            continue
        while len(row) > len(keys) and not row[-1].strip():
            del row[-1]
        row += [""] * sum(not key for key in keys[len(row) :])
        if len(row) != len(keys):
            raise InputError(
                f"{file}, line {line_number}: {len(row)} values "
                f"for the {len(keys)} keys of the first line"
            )
        value_by_key = {
            key: value
            for key, value in zip(keys, row, strict=True)
            if value.strip() and value.strip() not in _NULL_CELLS
        }
        if "" in value_by_key:
            hint = "a column with values needs a key in the first line (pandas: to_csv(..., index=False))"
            raise InputError(f"{file}, line {line_number}: unknown key ''; {hint}")
        yield (
            line_number,
            {key: _convert_cell(key, value, delimiter) for key, value in value_by_key.items()},
        )


def _split_table_rows(text: str, file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the numbers of the lines that they begin in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        while True:
            line_number = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            yield line_number, row
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: not a table ({error})") from None


def _detect_delimiter(header: str, *, is_tabbed: bool = False) -> str:
    """Return the delimiter of the keys, none of which contains a possible delimiter itself."""
    return max("\t,;|" if is_tabbed else ",;\t|", key=header.count)


def _read_table_keys(row: list[str], file: Path, line_number: int) -> list[str]:
    """Return the keys of a table, empty for columns without one; raises InputError for duplicates."""
    keys = [key.strip() for key in row]
    if duplicate_keys := [key for key in keys if key and keys.count(key) > 1]:
        raise InputError(f"{file}, line {line_number}: the key {duplicate_keys[0]} is given twice")
    return keys


def _convert_cell(key: str, cell: str, delimiter: str) -> object:
    if (
        delimiter != ","
        and not _is_text_setting(key)
        and re.fullmatch(r"\s*[+-]?[0-9]+,[0-9]+\s*", cell)
    ):
        # locales with a decimal comma write tables with other delimiters
        cell = cell.replace(",", ".")
    value = _convert_whole_number(key, cell)
    return (
        int(value)
        if key == "seed" and isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value)
        else value
    )


def _convert_whole_number(key: str, value: object) -> object:
    """Return 42 for 42.0 where the setting is an int; other values are returned unchanged.

    Programs turn a column of whole numbers with empty cells into floats. Numbers of more digits than a float
    holds exactly stay as they are: the lost digits are not invented.
    """
    if _find_setting_type(key) not in (int, int | None):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**_MAX_FLOAT_DIGITS:
        return int(value)
    if isinstance(value, str) and (
        match := re.fullmatch(rf"\s*([+-]?[0-9]{{1,{_MAX_FLOAT_DIGITS}}})\.0*\s*", value)
    ):
        return match[1]
    return value


def _find_setting_type(key: str) -> object:
    field = list_settings().get(KEY_ALIASES.get(key, key))
    return None if field is None else field.type


def _is_text_setting(key: str) -> bool:
    return _find_setting_type(key) in (str, str | None)


def _allows_null(key: str) -> bool:
    """Whether null is passed on as a value, to be used or reported; for other keys it is an empty cell."""
    return key == "task" or _find_setting_type(key) not in (int, float, str, bool, Any)
