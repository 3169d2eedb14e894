"""A user's own task: a YAML file that names one of the tasks, and settings on top of its defaults; no torch.

``task=mine.yaml`` stands for the settings of the file, of which those on the command line are changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from wan_dist.config.checks import PATH_KEYS
from wan_dist.config.paths import resolve_setting
from wan_dist.config.typed_settings import check_setting, format_override
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 2**20


def expand_task_file(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``task=FILE.yaml`` replaced by the file's task and settings.

    Its paths are relative to it. Raises InputError for a file that cannot be read, or has no ``base``.
    """
    index = next(
        (
            index
            for index, argument in reversed(list(enumerate(arguments)))
            if argument.startswith("task=")
        ),
        None,
    )
    if index is None or not arguments[index].lower().endswith(_SUFFIXES):
        return list(arguments)
    settings = _read_settings(arguments[index].partition("=")[2])
    own_arguments = [
        argument
        for argument in (*arguments[:index], *arguments[index + 1 :])
        if not argument.startswith("task=")
    ]
    given_keys = {argument.partition("=")[0] for argument in own_arguments}
    file_arguments = [
        format_override(key, value) for key, value in settings.items() if key not in given_keys
    ]
    return [*file_arguments, *own_arguments]


def _read_settings(name: str) -> dict[str, Any]:
    """Return the settings of a file by dotted key, its ``base`` as ``task``."""
    try:
        path = Path(name).expanduser()
        content = yaml.safe_load(read_text_file(path, max_bytes=_MAX_BYTES))
    except (UnreadableFileError, RuntimeError) as error:
        raise InputError(f"task={name}: cannot read the file ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"task={name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("base"), str):
        raise InputError(
            f"task={name} names no task to start from; it needs a line such as base: i2v-14B"
        )
    settings = {"task": content.pop("base")}
    for key, value in _flatten(content):
        if key in ("task", "base"):
            raise InputError(f"task={name}: the task is named by base, not by {key}")
        try:
            check_setting(key, value)
        except InputError as error:
            raise InputError(f"task={name}: {error}") from None
        settings[key] = resolve_setting(path.parent, key, value, PATH_KEYS)
    return settings


def _flatten(content: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
