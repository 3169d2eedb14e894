"""Checks of single settings."""

import math
import os
from pathlib import Path

from wan_dist.runtime.errors import InputError, escape_unprintable, suggest_nearest

MAX_PROMPT_CHARACTERS = 2**20
_MAX_NAME_BYTES = 200
"""Of the 255 that file systems allow: files have suffixes, the longest where a run was ended, and are written under other names."""
_RESERVED_SUFFIXES = (".latents", ".state")
"""Of files beside a video: another job's could not be told apart from those."""


def check_path(key: str, value: str) -> None:
    """Raise InputError unless ``value`` can be a file or folder, for `dit_file` one or two."""
    if not value.strip():
        raise InputError(
            f"{key} is empty; leave it out, or say which {'folder' if key.endswith('dir') else 'file'}"
        )
    try:
        if key == "dit_file":
            split_file_list(value)
        else:
            Path(value.strip()).expanduser()
    except RuntimeError:
        raise InputError(
            f"{key}={value}: no home folder of this user is known; ./~ begins a name with ~"
        ) from None


def split_file_list(value: str) -> list[Path]:
    """Return the files of a setting, one or two with a comma between; where such a file exists, a comma is part of its name."""
    comma_indices = [index for index, character in enumerate(value) if character == ","]
    candidate_names = [
        [value],
        *([value[:comma_index], value[comma_index + 1 :]] for comma_index in comma_indices),
        value.split(","),
    ]
    candidate_names = [
        [name.strip() for name in names if name.strip()] for names in candidate_names
    ]
    candidate_paths = [[Path(name).expanduser() for name in names] for names in candidate_names]
    return next(
        (paths for paths in candidate_paths if paths and all(map(os.path.exists, paths))),
        candidate_paths[-1] or candidate_paths[0],
    )


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(
            f"{key}={value} is not one of {', '.join(choices)}{suggest_nearest(value, choices)}"
        )


def check_positive(key: str, value: float | None, unit: str = "", hint: str = "") -> None:
    """Raise InputError unless ``value`` is None, or above 0 and finite."""
    if value is not None and not 0 < value < math.inf:
        requirement = "above 0" if value <= 0 else "finite"
        raise InputError(f"{key}={value}: it must be {requirement}{unit and ', in '}{unit}{hint}")


def check_prompt_length(key: str, text: str) -> None:
    """Raise InputError for a prompt that is longer than any model reads, by far."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"{key} has {len(text)} characters; models read the first 500 words, and {MAX_PROMPT_CHARACTERS} are taken"
        )


def check_file_name(key: str, name: str) -> None:
    """Raise InputError unless files can be called ``name``, with the suffixes that they get, and a terminal shows it as it is."""
    if not name.strip() or "/" in name or name.startswith(".") or escape_unprintable(name) != name:
        raise InputError(
            f"{key}={name!r} must be a plain file name without control characters; folders go into output.dir"
        )
    stem = name.removesuffix(".mp4").removesuffix(".png").casefold()
    if suffix := next((suffix for suffix in _RESERVED_SUFFIXES if stem.endswith(suffix)), None):
        raise InputError(
            f"{key}={name}: names that end in {suffix} are those of files kept beside another video; give it another name"
        )
    if (num_bytes := len(name.encode())) > _MAX_NAME_BYTES:
        raise InputError(
            f"{key}={name[:40]}... has {num_bytes} bytes; with suffixes there is room for {_MAX_NAME_BYTES}"
        )
