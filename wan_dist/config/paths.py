"""Folders of the program: what is installed with it, and its place in the user's cache."""

from pathlib import Path

from wan_dist.runtime.environment import read_text_variable


def find_packaged_folder(name: str, checkout_name: str) -> Path:
    """Return the folder ``name`` that is in the package once it is installed; in a checkout it is ``checkout``, beside the package."""
    package_folder = Path(__file__).parents[1]
    return (
        package_folder / name
        if (package_folder / name).is_dir()
        else package_folder.parent / checkout_name
    )


def find_user_cache() -> Path | None:
    """Return the folder in the user's cache that is ours, None for a user without a home."""
    try:
        return Path(read_text_variable("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wan-dist"
    except RuntimeError:
        return None
