"""Cache folders of libraries and of this program, also for a user without a home folder or a name.

``docker --user 12345``, Kubernetes and OpenShift run as such users: HOME is not set, or is a folder that
cannot be written to, and the user database does not know them. Libraries then ask for a name and fail, or
create a folder called ``~`` where the run is started.
"""

import contextlib
import getpass
import os
import tempfile
from pathlib import Path

from wan_dist.runtime.environment import read_text_variable


def find_home_folder() -> Path | None:
    """Return the user's home folder, None if there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def configure_library_caches() -> str | None:
    """Set the variables that libraries need for a user without a name or a writable home folder.

    Called before the libraries are imported; variables that are set already stay. Returns a note for the log,
    None if there is nothing to report.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # KeyError: until Python 3.12
        os.environ["USER"] = f"uid-{os.getuid()}"
    home = find_home_folder()
    if home is not None and is_writable(home / ".triton"):
        return None
    with contextlib.suppress(OSError):
        folder = _make_private_folder()
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        if home is None and not read_text_variable("XDG_CACHE_HOME"):
            os.environ.setdefault("HF_HOME", str(folder / "huggingface"))
    if home is None and not read_text_variable("XDG_CACHE_HOME"):
        return (
            "the home folder is unknown, as HOME is not set: prompt embeddings are not cached; "
            "cache.dir=FOLDER keeps them"
        )
    return None


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written to, or created."""
    existing_ancestor = next(
        candidate
        for candidate in (folder.absolute(), *folder.absolute().parents)
        if os.path.lexists(candidate)
    )
    return existing_ancestor.is_dir() and os.access(existing_ancestor, os.W_OK | os.X_OK)


def _make_private_folder() -> Path:
    """Return a folder for temporary caches that no other user can write to.

    Libraries execute the code that they find in their caches.
    """
    folder = Path(tempfile.gettempdir()) / f"wan-dist-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_private = (
        status.st_uid == os.getuid() and not status.st_mode & 0o022 and not folder.is_symlink()
    )
    return folder if is_private else Path(tempfile.mkdtemp(prefix="wan-dist-"))
