"""Typed fields of untrusted JSON: a value of the expected type, or nothing."""

import math
from collections.abc import Mapping

_MAX_TEXT_LENGTH = 20_000


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


def make_natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key for natural sorting: job-2 before job-10."""
    parts: list[tuple[int, int, str]] = []
    digits = ""
    for character in f"{name}\0":
        if "0" <= character <= "9":
            digits += character
            continue
        if digits:
            parts.append((0, int(digits[:18]), digits))
            digits = ""
        parts.append((1, 0, character))
    return parts
