"""The published checkpoint of a task: from the Hugging Face cache, or downloaded into it."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_dist.runtime.environment import text_of
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption
from wan_dist.tasks.registry import Task
from wan_dist.weights.layout import download_patterns, find_layout

_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_MIRROR = ("HF_ENDPOINT",)
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def snapshot_download(repository: str, **options: Any) -> str:
    """Call huggingface_hub's function of this name; importing it may fail already, at what is set in the environment."""
    import huggingface_hub

    return huggingface_hub.snapshot_download(repository, **options)


def find_checkpoint(task: Task, *, area: int) -> Path:
    """Return the folder of the task's published checkpoint for videos of ``area`` pixels, downloaded if it is not cached whole.

    Raises InputError, with the folder that is wanted, when it is neither there nor can be fetched.
    """
    repository, patterns = task.hub_repository(area), download_patterns(task)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        for part in find_layout(folder, task).transformers:
            part.open()  # a shard may be missing
    except Exception:  # not there, not whole, or not to be read: the download says which
        return download(task, area=area)
    return folder


def download(task: Task, *, area: int, folder: Path | None = None) -> Path:
    """Download the task's published checkpoint for videos of ``area`` pixels to a folder, by default of the Hugging Face cache; returns it.

    Files that are there whole are not fetched again. Raises InputError if it cannot be fetched. A signal ends the process at once:
    what has come is kept, and others would wait for the file that is under way.
    """
    repository, patterns = task.hub_repository(area), download_patterns(task)
    logger.info("download  %s to %s", repository, folder or "the Hugging Face cache")
    try:
        with preemption.ends_at_once():
            return Path(snapshot_download(repository, allow_patterns=patterns, local_dir=folder))
    except Exception as fault:  # of the hub's client, of what it sends requests with, of the disk
        raise InputError(
            f"the checkpoint of {task.name} is not on this machine and could not be downloaded: {_explain(fault)}; or where there is "
            f"internet run `python -m launch fetch {task.name} FOLDER` or `hf download {repository} --local-dir FOLDER`, then pass "
            f"ckpt_dir=FOLDER; it must hold {', '.join(patterns)}"
        ) from None


def _explain(fault: Exception) -> str:
    """Return why a download failed, and the variable that may mend it."""
    causes = list(_causes(fault))
    answered = [cause for cause in causes if getattr(cause, "response", None) is not None]
    origin = answered[0] if answered else causes[-1]
    said = f"{type(origin).__name__}: {first_line(origin)}"
    if offline := _first_set(_OFFLINE):
        return f"{offline} forbids it; unset it"
    if answered and getattr(getattr(origin, "response", None), "status_code", None) in (401, 403):
        return f"{said}; a token is refused: renew what HF_TOKEN or `hf auth login` has set, or do without, as public files need none"
    if _is_of_disk(causes, _FULL):
        return f"{said}; make room, or have HF_HOME=FOLDER name a disk that has some"
    if _is_of_disk(causes, _FORBIDDEN):
        return f"{said}; have HF_HOME=FOLDER name a folder that you may write to"
    proxy, mirror, certificates = (_first_set(keys) for keys in (_PROXIES, _MIRROR, _CERTIFICATES))
    if proxy and any(isinstance(cause, ImportError) for cause in causes):
        return f"{proxy} needs a package that is not installed ({said}): pip install socksio, or unset it"
    is_certificate = "SSL" in said.upper() or type(origin) is FileNotFoundError
    named = [key for key in (mirror, proxy, certificates if is_certificate else None) if key]
    return f"{said}; " + (f"{' and '.join(named)} may be wrong" if named else "is there internet")


def _is_of_disk(causes: list[BaseException], numbers: tuple[int, ...]) -> bool:
    """Whether an error of a file is behind it; those of files have a name, and some libraries only its text."""
    of_files = (cause for cause in causes if isinstance(cause, OSError) and (cause.filename is not None or cause.errno in _FULL))
    texts = tuple(f"(os error {number})" for number in numbers)
    return any(cause.errno in numbers for cause in of_files) or any(text in str(cause) for cause in causes for text in texts)


def _causes(fault: BaseException) -> Iterator[BaseException]:
    """Go from an error to those that it came from."""
    seen: BaseException | None = fault
    for _ in range(20):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _first_set(keys: tuple[str, ...]) -> str | None:
    """Return the first of the variables that is set, also in lower case, as KEY=VALUE without a password."""
    for key in (name for upper in keys for name in (upper, upper.lower())):
        if (value := text_of(key)) and value != "0":
            return f"{key}={re.sub(r'//[^/@]*@', '//...@', value)}"
    return None


def check_whole(folder: Path, task: Task) -> None:
    """Raise InputError unless all files of the task are there and their headers can be read."""
    layout = find_layout(folder, task)
    for part in (*layout.transformers, layout.text_encoder, layout.image_encoder, layout.vae):
        if part is not None:
            part.open()
