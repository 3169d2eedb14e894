"""Settings that a video file carries: JSON in its comment, which ``from=FILE`` reads; no torch."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from wan_dist.config.checks import PATH_KEYS, PROMPT_KEYS
from wan_dist.config.schema import RunConfig, list_settings, read_settings
from wan_dist.config.settings import OUTPUTS, SettingValues
from wan_dist.config.typed_settings import check_setting, format_override
from wan_dist.config.video_formats import STILL_SUFFIX
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import FfmpegError, read_comment

_PROGRAM = "wan-dist"
_LOADING_KEYS = ("lora_unmatched",)
"""Settings without effect on a result, without which it may not be made."""


def select_recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a video carries, by key: all that its files depend on.

    Of a service's videos, which it sends to others, paths of its machine are left out.
    """
    settings = read_settings(config, OUTPUTS)
    settings |= {key: getattr(config, key) for key in _LOADING_KEYS}
    is_service = config.serve.port is not None
    return {key: value for key, value in settings.items() if not (is_service and key in PATH_KEYS)}


def format_settings(settings: SettingValues, *, version: str, digest: str) -> str:
    """Return the comment of a video; the texts in ``settings`` are as they were read."""
    recorded_settings = {
        # never the name of a file
        key: f"@{value}" if key in PROMPT_KEYS and str(value).startswith("@") else value
        for key, value in settings.items()
    }
    content = {
        "program": _PROGRAM,
        "version": version,
        "digest": digest,
        "settings": recorded_settings,
    }
    return json.dumps(content, ensure_ascii=False)


def expand_recorded_settings(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``from=FILE`` replaced by the settings in a video or image.

    Other arguments have the last word. Raises InputError for a file without such settings.
    """
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("from=")]
    if not names:
        return list(arguments)
    own_arguments = [argument for argument in arguments if not argument.startswith("from=")]
    given_keys = {argument.partition("=")[0].lstrip("+") for argument in own_arguments}
    if "preset" in given_keys:
        raise InputError(
            f"preset beside from={names[-1]}: the video's own sampling settings count; "
            "give those to change by their keys, e.g. sample.steps=4"
        )
    recorded_arguments = [
        format_override(key, value)
        for key, value in _read_settings(names[-1]).items()
        if key not in given_keys
    ]
    return [*recorded_arguments, *own_arguments]


@cache
def _read_settings(name: str) -> dict[str, Any]:
    """Return the settings in a file by key. It may be anybody's: no key but those of a result is taken."""
    try:
        comment = _read_comment(Path(name).expanduser())
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"from={name} cannot be read: {reason}") from None
    try:
        content = json.loads(comment or "")
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise InputError(
            f"from={name} holds no settings: another program made it, or output.metadata=false, "
            "or they were removed on its way; the .json beside a result has them too"
        )
    settings = content["settings"]
    for key, value in settings.items():
        try:
            check_setting(key, value)
        except InputError as error:
            raise InputError(f"from={name}: {error}") from None
        if not list_settings()[key].metadata["effect"] & OUTPUTS and key not in _LOADING_KEYS:
            raise InputError(f"from={name}: {key} is no setting of a result")
    return {
        # never the name of a file that is read
        key: f"@{value}" if _names_file(key, value) else value
        for key, value in settings.items()
    }


def _names_file(key: str, value: object) -> bool:
    text = str(value)
    return key in PROMPT_KEYS and text.startswith("@") and not text.startswith("@@")


def _read_comment(path: Path) -> str | None:
    """Return the comment of a video or image; raises OSError and FfmpegError."""
    if path.suffix.lower() != STILL_SUFFIX:
        path.open("rb").close()  # a message of the system's, where it cannot be opened
        return read_comment(path)
    try:
        with Image.open(path) as image:
            return image.info.get("comment")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FfmpegError(str(error)) from None
