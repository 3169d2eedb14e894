"""Folders that libraries and this program keep things in for a user, also for one without a home folder or a name.

``docker --user 12345``, Kubernetes and OpenShift give such users: HOME is not set, or a folder that nobody may write to, and the user
database does not know them. Libraries then ask for a name and fail, or make a folder called ``~`` where the run is started.
"""

import contextlib
import getpass
import os
import tempfile
from pathlib import Path

from wan_dist.runtime.environment import read_text_variable


def find_home_folder() -> Path | None:
    """Return the user's home folder, None where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def configure_library_caches() -> str | None:
    """Set what libraries need for a user without a name or a home that can be written to; returns what to tell about it, if anything.

    Called before they are imported; what is set already stays.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # the first until Python 3.12
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
        return "no home folder is known, HOME is not set: prompt embeddings are not kept; cache.dir=FOLDER keeps them"
    return None


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    existing_ancestor = next(
        candidate
        for candidate in (folder.absolute(), *folder.absolute().parents)
        if os.path.lexists(candidate)
    )
    return existing_ancestor.is_dir() and os.access(existing_ancestor, os.W_OK | os.X_OK)


def _make_private_folder() -> Path:
    """Return a folder for temporary caches that nobody else can write to; libraries run the code that they find in theirs."""
    folder = Path(tempfile.gettempdir()) / f"wan-dist-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_private = (
        status.st_uid == os.getuid() and not status.st_mode & 0o022 and not folder.is_symlink()
    )
    return folder if is_private else Path(tempfile.mkdtemp(prefix="wan-dist-"))
