"""Text of a job file -> its entries, each with its line: a prompt a line, JSON objects, or the rows of a table; no torch."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_dist.config.schema import leaf_fields
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableError, read_text

ALIASES = {
    "name": "output.name",
    "steps": "sample.steps",
    "solver": "sample.solver",
    "shift": "sample.shift",
    "guide_scale": "sample.guide_scale",
    "frames": "frame_num",
}
"""Short names that keys have in a file of jobs."""

Entry = tuple[int, dict[str, object]]
"""A line, from 1, and what it sets."""

_MOST_BYTES = 64 * 2**20
_KINDS = "a prompt a line (.txt, .prompts or no suffix), JSON objects (.jsonl, .ndjson or .json) or a table (.csv or .tsv)"
_HINTS = {
    "save it as .csv": (".xlsx", ".xls", ".xlsm", ".ods", ".numbers", ".parquet", ".feather"),
    "save it as plain text, .txt": (".docx", ".doc", ".odt", ".rtf", ".pages", ".pdf"),
    "unpack it": (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar"),
}
_FOREIGN = {
    "version https://git-lfs": "a Git LFS pointer: fetch the file with `git lfs pull`",
    "<!doctype html": "a page of HTML, as a failed download leaves: download it again",
    "<html": "a page of HTML, as a failed download leaves: download it again",
    "<?xml": "XML: save it as .csv or .jsonl",
    "{\\rtf": "rich text (RTF): save it as plain text",
    "%pdf-": "a PDF: save it as plain text",
}
_JSON = re.compile(r'\[?\s*\{\s*"[^"]*"\s*:|[\[{]\s*\Z|\[\s*"[^"]*"\s*[,\]]\s*("|\Z)')
"""How the first line of JSON begins, which few prompts do."""
_NO_VALUE = ("NaN", "nan", "<NA>", "#N/A", "NaT")
"""What programs write for an empty cell."""
_MOST_DIGITS = 15
"""Of a whole number that was written as a float: more are not kept exactly."""


def read_entries(file: Path) -> Iterator[Entry]:
    """Return the entries of a file; raises InputError, with the line, for what cannot be read, and for kinds that are not known."""
    readers = {"": _prompts, ".txt": _prompts, ".prompts": _prompts, ".jsonl": _objects, ".ndjson": _objects, ".json": _array}
    readers |= {".csv": _rows, ".tsv": _rows}
    if (suffix := file.suffix.lower()) not in readers:
        hint = next((hint for hint, suffixes in _HINTS.items() if suffix in suffixes), "save it as one of these, or rename it if it is one")
        raise InputError(f"{file} cannot be read as a file of jobs: it is {suffix}, and taken are {_KINDS}; {hint}")
    try:
        text = re.sub("^\ufeff", "", read_text(file, most=_MOST_BYTES), flags=re.MULTILINE)  # also of files put one after the other
    except UnreadableError as fault:
        raise InputError(f"{file} cannot be read as a file of jobs: {fault}") from None
    begins = text[:100].lstrip().lower()
    if foreign := next((what for sign, what in _FOREIGN.items() if begins.startswith(sign)), None):
        raise InputError(f"{file} cannot be read as a file of jobs: it is {foreign}")
    return readers[suffix](text, file)


def _prompts(text: str, file: Path) -> Iterator[Entry]:
    """Yield each line as a prompt as it stands; one that is ``@FILE.txt`` names the file that has it."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if kind := ".jsonl or .json" if _JSON.match(first) else ".csv" if _is_header(first) else None:
        hint = 'a prompt that looks so can be written in .jsonl, as {"prompt": "..."}'
        raise InputError(f"{file} is named as a prompt a line, but begins as a {kind} file does: {first[:60]}; rename it ({hint})")
    for number, line in enumerate(text.split("\n"), 1):
        if prompt := line.strip():
            is_plain_at = prompt.startswith("@") and not re.fullmatch(r"@[^@].*\.txt", prompt, re.IGNORECASE)
            yield number, {"prompt": f"@{prompt}" if is_plain_at else prompt}


def _is_header(line: str) -> bool:
    """Whether a line is the first of a table: two keys or more."""
    keys = [key.strip(' "') for key in line.split(_delimiter_of(line))]
    return len(keys) > 1 and all(key in ALIASES or key in leaf_fields() for key in keys)


def _objects(text: str, file: Path) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
        except (ValueError, RecursionError) as fault:
            hint = "; an array, or objects over several lines, are read from .json" if line.strip() in ("[", "{", "[{") else ""
            raise InputError(f"{file}, line {number}: not JSON ({fault}){hint}") from None
        yield number, _as_object(entry, file, number)


def _array(text: str, file: Path) -> Iterator[Entry]:
    """Yield the objects of an array, or one object, or objects a line, as people also call .json."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
    if not text.strip():
        return
    try:
        content = decoder.decode(text)
    except json.JSONDecodeError as fault:
        if fault.msg != "Extra data":
            raise InputError(f"{file}, line {fault.lineno}: not JSON ({fault.msg}: column {fault.colno})") from None
        yield from _objects(text, file)
        return
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{file}: not JSON ({fault})") from None
    counted, position, number = 0, text.index("[") + 1 if isinstance(content, list) else 0, 1
    for entry in content if isinstance(content, list) else [content]:
        position = next(place for place in range(position, len(text)) if text[place] not in " \t\n,")
        number += text.count("\n", counted, position)
        yield number, _as_object(entry, file, number)
        counted, (_, position) = position, decoder.raw_decode(text, position)


def _as_object(entry: object, file: Path, number: int) -> dict[str, object]:
    if not isinstance(entry, dict):
        raise InputError(f'{file}, line {number}: not an object of settings, such as {{"prompt": "two cats boxing", "seed": 7}}')
    return {key: _whole(key, value) for key, value in entry.items() if value is not None or _may_be_null(key)}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number; leave the key out, or write null")


def _rows(text: str, file: Path) -> Iterator[Entry]:
    """Yield the rows of a table as settings by the keys in its first one. The separator is the one found between the keys."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = _delimiter_of(first, is_tabbed=file.suffix.lower() == ".tsv")
    if separator := re.fullmatch(r"""\s*"?sep=([^\w\s"']|\t)"?\s*""", first, re.IGNORECASE):  # Excel writes it before the keys
        delimiter, text = separator[1], text.replace(first, "", 1)
    keys: list[str] = []
    for number, row in _cells(text, file, delimiter):
        if not any(cell.strip() for cell in row):
            continue
        if not keys:
            keys = _keys(row, file, number)
            continue
        while len(row) > len(keys) and not row[-1].strip():
            del row[-1]
        row += [""] * sum(not key for key in keys[len(row) :])
        if len(row) != len(keys):
            raise InputError(f"{file}, line {number}: {len(row)} values for the {len(keys)} keys of the first line")
        found = {key: value for key, value in zip(keys, row, strict=True) if value.strip() and value.strip() not in _NO_VALUE}
        if "" in found:
            hint = "a column with values needs a key in the first line (pandas: to_csv(..., index=False))"
            raise InputError(f"{file}, line {number}: unknown key ''; {hint}")
        yield number, {key: _value(key, value, delimiter) for key, value in found.items()}


def _cells(text: str, file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the lines that they begin in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        while True:
            number = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            yield number, row
    except csv.Error as fault:
        raise InputError(f"{file}, line {reader.line_num}: not a table ({fault})") from None


def _delimiter_of(header: str, *, is_tabbed: bool = False) -> str:
    """Return what stands between the keys, which have none of these themselves."""
    return max("\t,;|" if is_tabbed else ",;\t|", key=header.count)


def _keys(row: list[str], file: Path, number: int) -> list[str]:
    """Return the keys of a table; empty columns have none."""
    keys = [key.strip() for key in row]
    if twice := [key for key in keys if key and keys.count(key) > 1]:
        raise InputError(f"{file}, line {number}: the key {twice[0]} is given twice")
    return keys


def _value(key: str, cell: str, delimiter: str) -> object:
    if delimiter != "," and not _is_text(key) and re.fullmatch(r"\s*[+-]?[0-9]+,[0-9]+\s*", cell):
        cell = cell.replace(",", ".")  # tables with other separators are from where numbers are written so
    value = _whole(key, cell)
    return int(value) if key == "seed" and isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value) else value


def _whole(key: str, value: object) -> object:
    """Return 42 for 42.0, as tables with empty cells have whole numbers; a digit that was lost is not made up."""
    if _type_of(key) not in (int, int | None):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**_MOST_DIGITS:
        return int(value)
    if isinstance(value, str) and (found := re.fullmatch(rf"\s*([+-]?[0-9]{{1,{_MOST_DIGITS}}})\.0*\s*", value)):
        return found[1]
    return value


def _type_of(key: str) -> object:
    field = leaf_fields().get(ALIASES.get(key, key))
    return None if field is None else field.type


def _is_text(key: str) -> bool:
    return _type_of(key) in (str, str | None)


def _may_be_null(key: str) -> bool:
    """Whether null is a value of a key, or an error that is said elsewhere; of others it is an empty cell."""
    return key == "task" or _type_of(key) not in (int, float, str, bool, Any)
