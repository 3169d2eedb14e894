"""Typed fields of untrusted JSON: a value of the expected type, or nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TypeVar, cast

T = TypeVar("T")
_MAX_TEXT_LENGTH = 20_000


def json_field(read_value: Callable[[Mapping[str, object], str], T]) -> T | None:
    """Return a dataclass field that is None unless set; ``read_value`` reads it from an object by its key."""
    return cast(T | None, field(default=None, metadata={"read_value": read_value}))


def get_text(entry: Mapping[str, object], key: str) -> str:
    """Return a text, empty where there is none; characters that UTF-8 cannot encode are replaced."""
    value = entry.get(key)
    return (
        value[:_MAX_TEXT_LENGTH].encode("utf-8", "replace").decode()
        if isinstance(value, str)
        else ""
    )


def get_number(entry: Mapping[str, object], key: str) -> float | None:
    """Return a finite number, or None."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e18:
        return None
    return float(value) if math.isfinite(value) else None


def get_timestamp(entry: Mapping[str, object], key: str) -> float | None:
    """Return seconds since the epoch, in the range of calendar dates, or None."""
    value = get_number(entry, key)
    return value if value is not None and 0 <= value < 2.5e11 else None


def get_integer(entry: Mapping[str, object], key: str) -> int | None:
    """Return a whole number of up to 64 bits, or None."""
    value = entry.get(key)
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
        else None
    )


def get_object(entry: Mapping[str, object], key: str) -> dict[str, object]:
    """Return an object, empty where there is none."""
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def get_list(entry: Mapping[str, object], key: str) -> list[object]:
    """Return a list, empty where there is none."""
    value = entry.get(key)
    return value if isinstance(value, list) else []


def get_texts(entry: Mapping[str, object], key: str) -> list[str]:
    """Return the texts of a list, empty where there is none."""
    return [get_text({"": item}, "") for item in get_list(entry, key) if isinstance(item, str)]
