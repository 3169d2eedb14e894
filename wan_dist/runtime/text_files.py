"""Small files that users give, read with care: no pipe is waited for, no device read for ever, nothing but UTF-8 text taken."""

import codecs
import json
import stat
from pathlib import Path
from typing import Any

from wan_dist.runtime.errors import InputError

_MOST_BYTES_OF_JSON = 16 * 2**20
_OTHERS = {
    codecs.BOM_UTF16_LE: "UTF-16 (save it as UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 (save it as UTF-8)",
    b"PK\3\4": "a ZIP archive, as .xlsx and .docx are (save it as .csv or .txt)",
    b"\x1f\x8b": "packed by gzip (unpack it)",
}
"""How files begin that are called texts and are none."""


class UnreadableError(ValueError):
    """Why a file cannot be read, in words that follow its name."""


def check_file(path: Path) -> None:
    """Raise UnreadableError unless there is a file: no folder, pipe or device, which may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as fault:
        raise UnreadableError(fault.strerror) from None
    if not stat.S_ISREG(mode):
        raise UnreadableError("it is not a file")


def read_text(path: Path, *, most: int) -> str:
    """Return a file's text, without the mark that some editors put before UTF-8; raises UnreadableError, also for over ``most`` bytes."""
    check_file(path)
    if (size := path.stat().st_size) > most:
        raise UnreadableError(f"it has {size} bytes, and texts {most} at most")
    try:
        with path.open("rb") as file:
            begin = file.read(4)
        if what := next((what for sign, what in _OTHERS.items() if begin.startswith(sign)), None):
            raise UnreadableError(f"it is {what}, not UTF-8 text")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UnreadableError(fault.strerror) from None
    except UnicodeDecodeError:
        raise UnreadableError("it is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise UnreadableError("it has NUL bytes, as UTF-16 has: it is not UTF-8 text; save it as UTF-8")
    return text


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raises InputError."""
    try:
        found = json.loads(read_text(path, most=_MOST_BYTES_OF_JSON))
    except UnreadableError as fault:
        raise InputError(f"{path} cannot be read: {fault}; download it again") from None
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path} is not valid JSON: {fault}; download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object, as it should be; download it again")
    return found
