"""Texts of a video's settings: prompts, also from files."""

from pathlib import Path

from wan_dist.config.checks import MAX_PROMPT_CHARACTERS
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file
from wan_dist.tasks.animate import DrivingVideo
from wan_dist.tasks.animate_2 import FollowedVideo


def read_prompt(value: str | None, *, is_required: bool) -> str | None:
    """Return the prompt of the setting's value; raises InputError if it is required and missing."""
    prompt = read_text_setting("prompt", value)
    if prompt is None and is_required:
        raise InputError(
            "prompt is missing; describe the video, "
            'e.g. prompt="two cats boxing on a stage", or prompt=@file.txt'
        )
    return prompt


def read_negative_prompt(value: str | None) -> str:
    """Return the negative prompt of the setting's value, empty where there is none."""
    return read_text_setting("negative_prompt", value) or ""


def read_text_setting(key: str, value: str | None) -> str | None:
    """Return the text, or the contents of the file after ``@``; ``@@`` begins a text with ``@``.

    ``key`` names the setting in errors. Raises InputError for a file that cannot be read, and for an empty
    one if ``key`` is prompt.
    """
    if value is None or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        path = Path(value[1:]).expanduser()
        text = read_text_file(path, max_bytes=MAX_PROMPT_CHARACTERS).strip()
    except UnreadableFileError as error:
        raise InputError(
            f"{key}={value}: cannot read {path} ({error}); write @@ for a text that begins with @"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{key}={value}: {error}") from None
    if not text and key == "prompt":
        raise InputError(f"{key}={value}: the file is empty")
    return text


def read_driving_prompt(
    value: str | None, driving: DrivingVideo | FollowedVideo | None
) -> str | None:
    """Return the prompt of a driving video that passes through the transformer, else None."""
    is_needed = isinstance(driving, FollowedVideo)
    return (read_text_setting("prompt_ref", value) or "") if is_needed else None


def estimate_text_tokens(text: str) -> int:
    """Return about how many tokens a text has, without a tokenizer."""
    return min(512, len(text.encode()) // 3 + 2)
