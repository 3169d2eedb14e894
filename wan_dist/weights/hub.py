"""Hugging Face download of published checkpoints and files, unless the cache holds them."""

import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wan_dist.runtime.environment import read_text_variable
from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import get_task
from wan_dist.weights.download_patterns import list_download_patterns
from wan_dist.weights.file_kinds import find_kind
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.layout import NO_FILES, GivenFiles, find_layout
from wan_dist.weights.published_files import PublishedFiles

_PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_MIRROR_VARIABLES = ("HF_ENDPOINT",)
_CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)


def snapshot_download(repository: str, **options: Any) -> str:
    """Call huggingface_hub's function of this name; environment variables can make even its import fail."""
    import huggingface_hub

    return huggingface_hub.snapshot_download(repository, **options)


def find_checkpoint(task: Task, *, area: int, given_files: GivenFiles = NO_FILES) -> Path:
    """Return the folder of the task's published checkpoint for videos of ``area`` pixels.

    It is downloaded unless the cache holds all of it, but for what ``given_files`` are used instead of.
    Raises InputError, with the files that a folder must hold, if it is neither cached nor can be fetched.
    """
    repository, patterns = task.choose_repository(area), list_download_patterns(task, given_files)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        for component_files in find_layout(folder, task, given_files).transformers:
            if component_files.setting is None:
                component_files.open()  # a shard may be missing
    except Exception:  # missing, incomplete or unreadable: the download's error says which
        return download_checkpoint(task, area=area, given_files=given_files)
    return folder


def download_checkpoint(
    task: Task, *, area: int, folder: Path | None = None, given_files: GivenFiles = NO_FILES
) -> Path:
    """Download the task's published checkpoint for videos of ``area`` pixels and return its folder.

    ``folder``: where to, by default into the Hugging Face cache. Complete files are not fetched again. Raises
    InputError if it cannot be fetched.
    """
    repository, patterns = task.choose_repository(area), list_download_patterns(task, given_files)
    try:
        return _download(repository, patterns, folder)
    except Exception as error:  # of the hub's client, of what it sends requests with, of the disk
        needed_patterns = [pattern for pattern in patterns if pattern not in task.lora_files]
        raise InputError(
            f"the checkpoint of {task.name} is not on this machine and could not be downloaded: "
            f"{_explain_download_error(error)}; or where there is internet "
            f"run `python -m launch fetch {task.name} FOLDER` "
            f"or `hf download {repository} --local-dir FOLDER`, then pass ckpt_dir=FOLDER; "
            f"it must have {', '.join(needed_patterns)}"
        ) from None


def _download(repository: str, patterns: Sequence[str], folder: Path | None) -> Path:
    """Download the files of these patterns and return their folder.

    A signal ends the process at once: partial downloads stay on disk, and other processes would wait for the
    lock of the file that is being fetched.
    """
    logger.info("download  %s to %s", repository, folder or "the Hugging Face cache")
    with preemption.immediate_exit():
        return Path(snapshot_download(repository, allow_patterns=list(patterns), local_dir=folder))


def download_files(files: PublishedFiles, *, folder: Path | None = None) -> Path:
    """Download published files and return the folder that holds them; otherwise as `download_checkpoint`."""
    try:
        return _download(files.repository, files.patterns, folder)
    except Exception as error:  # as above
        raise InputError(
            f"{files.name} could not be downloaded: {_explain_download_error(error)}; "
            f"or where there is internet run `python -m launch fetch {files.name} FOLDER` "
            f"or `hf download {files.repository} {' '.join(files.patterns)} --local-dir FOLDER`"
        ) from None


def check_files_complete(folder: Path, files: PublishedFiles) -> None:
    """Raise InputError unless all files exist, are of their settings' kinds, and have whole headers."""
    if "ckpt_dir" in files.files:
        check_checkpoint_complete(folder, get_task(files.task))
        return
    for setting, names in files.files.items():
        for name in names:
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder} has no {name}: {files.repository} no longer publishes it under this name; "
                    f"look there for another, and give it as {setting}=FILE"
                )
            kind = find_kind(TensorFiles([folder / name]).shapes)
            expected_setting = "lora" if setting.startswith("lora") else setting
            if kind is None or kind.setting != expected_setting:
                found = "of an unknown kind" if kind is None else kind.description
                raise InputError(
                    f"{folder / name} is {found}, not for {setting}=; download it again"
                )


def _explain_download_error(error: Exception) -> str:
    """Return why a download failed, and the environment variable whose change may help."""
    causes = list(_iterate_causes(error))
    http_errors = [cause for cause in causes if getattr(cause, "response", None) is not None]
    root_cause = http_errors[0] if http_errors else causes[-1]
    message = f"{type(root_cause).__name__}: {get_first_line(root_cause)}"
    if offline_setting := _find_set_variable(_OFFLINE_VARIABLES):
        return f"{offline_setting} forbids it; unset it"
    status_code = getattr(getattr(root_cause, "response", None), "status_code", None)
    if http_errors and status_code in (401, 403):
        return (
            f"{message}; a token is refused: renew what HF_TOKEN or `hf auth login` has set, "
            "or do without, as public files need none"
        )
    if _has_disk_error(causes, _DISK_FULL_ERRNOS):
        return f"{message}; free some space, or set HF_HOME=FOLDER to a disk with enough"
    if _has_disk_error(causes, _NO_PERMISSION_ERRNOS):
        return f"{message}; have HF_HOME=FOLDER name a folder that you may write to"
    proxy, mirror, certificates = (
        _find_set_variable(variables)
        for variables in (_PROXY_VARIABLES, _MIRROR_VARIABLES, _CERTIFICATE_VARIABLES)
    )
    if proxy and any(isinstance(cause, ImportError) for cause in causes):
        return (
            f"{proxy} needs a package that is not installed ({message}): "
            "pip install socksio, or unset it"
        )
    is_certificate_error = "SSL" in message.upper() or type(root_cause) is FileNotFoundError
    candidates = (mirror, proxy, certificates if is_certificate_error else None)
    suspect_settings = [setting for setting in candidates if setting]
    if not suspect_settings:
        return f"{message}; is there internet"
    return f"{message}; {' and '.join(suspect_settings)} may be wrong"


def _has_disk_error(causes: list[BaseException], error_numbers: tuple[int, ...]) -> bool:
    """Whether a file error with one of these numbers is among the causes.

    A file error has a file name, unlike a socket's; some libraries give only the text of the error.
    """
    file_errors = (
        cause
        for cause in causes
        if isinstance(cause, OSError)
        and (cause.filename is not None or cause.errno in _DISK_FULL_ERRNOS)
    )
    errno_texts = tuple(f"(os error {number})" for number in error_numbers)
    return any(cause.errno in error_numbers for cause in file_errors) or any(
        text in str(cause) for cause in causes for text in errno_texts
    )


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then the chain of those that it was raised from."""
    cause: BaseException | None = error
    for _ in range(20):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _find_set_variable(variables: tuple[str, ...]) -> str | None:
    """Return the first of the variables that is set, also in lower case, as KEY=VALUE without a password."""
    for variable in (name for upper in variables for name in (upper, upper.lower())):
        if (value := read_text_variable(variable)) and value != "0":
            return f"{variable}={re.sub(r'//[^/@]*@', '//...@', value)}"
    return None


def check_checkpoint_complete(folder: Path, task: Task, given_files: GivenFiles = NO_FILES) -> None:
    """Raise InputError unless all files of the task exist and their headers can be read."""
    layout = find_layout(folder, task, given_files)
    for component_files in (
        *layout.transformers,
        layout.text_encoder,
        layout.image_encoder,
        layout.vae,
        layout.audio_encoder,
    ):
        if component_files is not None:
            component_files.open()
