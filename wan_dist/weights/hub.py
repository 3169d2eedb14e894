"""The published checkpoint of a task: from the Hugging Face cache, or downloaded into it."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from wan_dist.catalog import Task
from wan_dist.errors import InputError
from wan_dist.log import logger
from wan_dist.weights.layout import download_patterns, find_layout


def find_checkpoint(task: Task, *, area: int) -> Path:
    """Return the folder of the task's published checkpoint for videos of ``area`` pixels, downloaded if it is not cached whole.

    Raises InputError, with the folder that is wanted, when it is neither there nor can be fetched.
    """
    repository, patterns = task.hub_repository(area), download_patterns(task)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        for part in find_layout(folder, task).transformers:
            part.open()  # a shard may be missing
        return folder
    except (LocalEntryNotFoundError, InputError):
        logger.info("download  %s to the Hugging Face cache", repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as fault:
        raise InputError(
            f"the checkpoint of {task.name} is not on this machine and could not be downloaded ({type(fault).__name__}); where there is "
            f"internet run `hf download {repository} --local-dir FOLDER`, then pass ckpt_dir=FOLDER; it must hold {', '.join(patterns)}"
        ) from None
