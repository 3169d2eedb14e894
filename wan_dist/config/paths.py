"""Paths: folders of the package and of the user's cache, and files that settings name in a file."""

from collections.abc import Collection
from pathlib import Path

from wan_dist.config.checks import (
    FILE_LIST_KEYS,
    PROMPT_KEYS,
    format_files,
    split_file_list,
    split_files,
)
from wan_dist.runtime.environment import read_text_variable


def find_packaged_folder(name: str, checkout_name: str) -> Path:
    """Return the folder ``name`` in the installed package.

    In a checkout it is ``checkout_name``, beside the package.
    """
    package_folder = Path(__file__).parents[1]
    return (
        package_folder / name
        if (package_folder / name).is_dir()
        else package_folder.parent / checkout_name
    )


def find_user_cache() -> Path | None:
    """Return the program's folder in the user's cache, None for a user without a home folder."""
    try:
        return Path(read_text_variable("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wan-dist"
    except RuntimeError:
        return None


def resolve_setting(folder: Path, key: str, value: object, path_keys: Collection[str]) -> object:
    """Return a setting's value as given in a file in ``folder``, with the paths that are relative to it.

    Paths are the values of ``path_keys`` and of `FILE_LIST_KEYS`, and what follows ``@`` in prompts. Values
    that cannot be files stay as they are, as is said when they are used.
    """
    if key in FILE_LIST_KEYS:
        names = (
            list(map(str, split_files(value)))
            if isinstance(value, str) and value.strip()
            else value
        )
        if isinstance(names, list):
            return format_files([_resolve_path(folder, name) for name in names])
    elif not isinstance(value, str):
        return value
    elif key == "dit_file" and key in path_keys:
        return ",".join(_resolve_path(folder, str(path)) for path in split_file_list(value))
    elif key in path_keys:
        return _resolve_path(folder, value)
    elif key in PROMPT_KEYS and value.startswith("@") and not value.startswith("@@"):
        return f"@{_resolve_path(folder, value[1:])}"
    return value


def _resolve_path(folder: Path, name: str) -> str:
    return name if name.startswith("~") else str(folder / name)
