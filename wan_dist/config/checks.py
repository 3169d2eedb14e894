"""Validation of single settings; each check raises InputError."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from wan_dist.config.video_formats import remove_result_suffix
from wan_dist.runtime.errors import InputError, escape_unprintable, suggest_nearest

MAX_PROMPT_CHARACTERS = 2**20
_MAX_NAME_BYTES = 200
"""Limit of a file's name, of the 255 bytes that file systems allow.

Suffixes, of which the longest is that of a run that was ended, and temporary names need the rest.
"""
_RESERVED_SUFFIXES = (".latents", ".state", ".preview")
"""Suffixes of the files beside a video; a job of such a name could not be told apart from those."""
PROMPT_KEYS = ("prompt", "negative_prompt", "prompt_ref")
WEIGHT_FILE_KEYS = ("dit_file", "t5_file", "vae_file", "clip_file")
"""Settings that name files of weights, used instead of a checkpoint's."""
LORA_KEYS = ("lora", "lora_high", "lora_low")
"""Settings that name LoRA files: of all transformers, and of one expert alone."""
FILE_LIST_KEYS = (*LORA_KEYS, "src_ref_images")
"""Settings that name one file or several, see `split_files`."""
PATH_KEYS = (
    "ckpt_dir",
    *WEIGHT_FILE_KEYS,
    *LORA_KEYS,
    "image",
    "first_frame",
    "last_frame",
    "src_video",
    "src_mask",
    "src_ref_images",
    "camera",
    "src_root_path",
    "src_pose",
    "src_face",
    "src_ref",
    "src_bg",
    "audio",
    "pose_video",
    "latents",
    "jobs",
    "cache.dir",
    "output.dir",
    "output.events",
    "output.audio",
    "serve.token_file",
)


def check_text(key: str, value: str) -> None:
    """Raise InputError for text that is not UTF-8, a prompt that is too long, and what cannot be a path."""
    if re.search("[\ud800-\udfff]", value):  # what Python makes of bytes that are not UTF-8
        raise InputError(
            f"{key}={value!r} is not UTF-8 text; "
            "check the encoding of the shell, or of the file that it comes from"
        )
    if key in PROMPT_KEYS:
        check_prompt_length(key, value)
    elif "\0" in value:
        raise InputError(f"{key}={value!r} has a NUL character, which file names cannot have")
    if key in PATH_KEYS:
        check_path(key, value)


def check_path(key: str, value: str) -> None:
    """Raise InputError unless ``value`` can be a path, or several where a setting takes them."""
    if not value.strip():
        raise InputError(
            f"{key} is empty; give a {'folder' if key.endswith('dir') else 'file'}, or leave it out"
        )
    try:
        if key == "dit_file":
            split_file_list(value)
        elif key in FILE_LIST_KEYS:
            split_files(value)
        else:
            Path(value.strip()).expanduser()
    except RuntimeError:
        raise InputError(
            f"{key}={value}: the home folder of this user is unknown; write ./~ for a name that begins with ~"
        ) from None


def split_file_list(value: str) -> list[Path]:
    """Return the files of a setting, one or two with a comma between.

    Where a file with a comma in its name exists, the comma is part of the name.
    """
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


def split_files(value: str) -> list[Path]:
    """Return the files of a setting: ``FILE``, ``FILE,FILE`` or ``[FILE,FILE]``, also as a list of JSON.

    A comma is part of a name where a file of that name exists; in JSON it always is.
    """
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            names = json.loads(text)
        except ValueError:
            names = None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return [Path(name).expanduser() for name in names]
        text = text[1:-1]
    return split_file_list(text)


def format_files(names: Sequence[str]) -> str:
    """Return files as the value of a setting that `split_files` splits into the same."""
    return json.dumps(list(names), ensure_ascii=False)


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
        raise InputError(f"{key}={value} must be {requirement}{unit and ', in '}{unit}{hint}")


def check_prompt_length(key: str, text: str) -> None:
    """Raise InputError for a prompt that is far longer than any model reads."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"{key} has {len(text)} characters; the limit is {MAX_PROMPT_CHARACTERS} "
            "(the models read about 500 words)"
        )


def check_file_name(key: str, name: str) -> None:
    """Raise InputError unless ``name`` can be a file's name, with suffixes, and a terminal shows it as is."""
    if not name.strip() or "/" in name or name.startswith(".") or escape_unprintable(name) != name:
        raise InputError(
            f"{key}={name!r} must be a plain file name without control characters; folders go into output.dir"
        )
    stem = remove_result_suffix(name).casefold()
    if suffix := next((suffix for suffix in _RESERVED_SUFFIXES if stem.endswith(suffix)), None):
        raise InputError(
            f"{key}={name}: names that end in {suffix} are reserved for files beside a video; "
            "choose another name"
        )
    if (num_bytes := len(name.encode())) > _MAX_NAME_BYTES:
        raise InputError(
            f"{key}={name[:40]}... has {num_bytes} bytes; the limit is {_MAX_NAME_BYTES}; give a shorter name"
        )
