"""Folder paths: files installed with the package, and the program's folder in the user's cache."""

from pathlib import Path

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
