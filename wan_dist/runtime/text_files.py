"""Text files given by users, read with checks: regular files of limited size, in UTF-8.

No pipe is waited for, and no device is read without end.
"""

import codecs
import json
import stat
from pathlib import Path
from typing import Any

from wan_dist.runtime.errors import InputError

_MAX_JSON_BYTES = 16 * 2**20
_NON_TEXT_SIGNATURES = {
    codecs.BOM_UTF16_LE: "UTF-16 (save it as UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 (save it as UTF-8)",
    b"PK\3\4": "a ZIP archive, as .xlsx and .docx are (save it as .csv or .txt)",
    b"\x1f\x8b": "packed by gzip (unpack it)",
}
"""First bytes of files that are named as text and are not, with what they are."""


class UnreadableFileError(ValueError):
    """A file cannot be read; the message gives the reason, in words that follow the file's name."""


def check_regular_file(path: Path) -> None:
    """Raise UnreadableFileError unless there is a file: no folder, pipe or device, which may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UnreadableFileError(error.strerror) from None
    if not stat.S_ISREG(mode):
        raise UnreadableFileError("it is not a file")


def read_text_file(path: Path, *, max_bytes: int) -> str:
    """Return a file's text, without the byte order mark that some editors put before UTF-8.

    Raises UnreadableFileError, also for a file of more than ``max_bytes`` bytes.
    """
    check_regular_file(path)
    if (num_bytes := path.stat().st_size) > max_bytes:
        raise UnreadableFileError(
            f"it has {num_bytes} bytes, and the limit for text files is {max_bytes}"
        )
    try:
        with path.open("rb") as file:
            first_bytes = file.read(4)
        if format_name := next(
            (
                format_name
                for signature, format_name in _NON_TEXT_SIGNATURES.items()
                if first_bytes.startswith(signature)
            ),
            None,
        ):
            raise UnreadableFileError(f"it is {format_name}, not UTF-8 text")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnreadableFileError(error.strerror) from None
    except UnicodeDecodeError:
        raise UnreadableFileError("it is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise UnreadableFileError(
            "it has NUL bytes, as UTF-16 has: it is not UTF-8 text; save it as UTF-8"
        )
    return text


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raises InputError."""
    try:
        json_object = json.loads(read_text_file(path, max_bytes=_MAX_JSON_BYTES))
    except UnreadableFileError as error:
        raise InputError(f"{path} cannot be read: {error}; download it again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(json_object, dict):
        raise InputError(f"{path} is not a JSON object; download it again")
    return json_object
