"""Command-line arguments: a command's own keys, and those of a run."""

from collections.abc import Sequence
from pathlib import Path

from wan_dist.runtime.errors import InputError


def split_arguments(
    arguments: Sequence[str], keys: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the values given for ``keys``, by key, and the other arguments."""
    values_by_key = {
        key: value
        for key, _, value in (argument.partition("=") for argument in arguments)
        if key in keys
    }
    return values_by_key, [
        argument for argument in arguments if argument.partition("=")[0] not in keys
    ]


def parse_count(key: str, text: str, noun: str) -> int:
    """Return the count, at least 1, given for ``key``; ``noun`` says of what. Raises InputError."""
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{key}={text} is not a number of {noun}, e.g. {key}=2")
    return int(text)


def expand_user_path(key: str, text: str) -> Path:
    """Return the path given for ``key``, with ``~`` expanded to the user's home folder.

    Raises InputError where the home folder is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{key}={text}: the home folder of this user is unknown; write ./~ for a name that begins with ~"
        ) from None
