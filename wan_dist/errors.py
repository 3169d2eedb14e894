"""The one error class that means "the user can fix this"."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, found before anything heavy starts; the message says what would work. The command exits with code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word most like ``word``, or an empty string."""
    known = list(known)
    close = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(fault: object) -> str:
    """Return the first line of an error's message, or of another text; its type where there is none."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)
