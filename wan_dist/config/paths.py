"""Folders of the program: what is installed with it, and its place in the user's cache."""

from pathlib import Path

from wan_dist.runtime.environment import text_of


def packaged(name: str, checkout: str) -> Path:
    """Return the folder ``name`` that is in the package once it is installed; in a checkout it is ``checkout``, beside the package."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / checkout


def user_cache() -> Path | None:
    """Return the folder in the user's cache that is ours, None for a user without a home."""
    try:
        return Path(text_of("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wan-dist"
    except RuntimeError:
        return None
