"""Input errors, which the user can fix, and error messages made safe for a terminal."""

import difflib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid input, found before expensive work starts; the message says what would work.

    The command exits with code 2.
    """


def suggest_nearest(word: str, known_words: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word most like ``word``, or an empty string."""
    known_words = list(known_words)
    close_matches = [
        name for name in known_words if name.startswith(word)
    ] or difflib.get_close_matches(word, known_words, n=1, cutoff=0.5)
    return f"; did you mean {close_matches[0]!r}?" if close_matches else ""


def get_first_line(error: object) -> str:
    """Return the first line of an error's message, or of another text; its type's name if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_UNPRINTABLE_PATTERN = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Characters that a terminal interprets instead of showing them, and lone surrogates.

Those are control characters, line separators, and changes of the text's direction.
"""


def escape_unprintable(text: str) -> str:
    r"""Return ``text`` as one line in which unprintable characters are escaped, for example as ``\x1b``."""
    return _UNPRINTABLE_PATTERN.sub(
        lambda found: found[0].encode("unicode_escape").decode("ascii"), text
    )


def format_message(error: object) -> str:
    """Return an error as a printable message for a terminal; the middle of a very long one is left out."""
    text = escape_unprintable(str(error))
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"
