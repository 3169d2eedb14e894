"""Download the checkpoint of a task, or files of a few-step model; an interrupted download resumes.

    python -m launch fetch                                                     # lists what there is
    python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B
    python -m launch fetch i2v-14B /shared/Wan2.1-I2V-14B-720P size=1280x720   # the one for this size
    python -m launch fetch t2v-1.3B                                            # into Hugging Face's cache
    python -m launch fetch lightx2v-4step-t2v-14B /shared/loras                # a LoRA, and how to use it

For machines whose nodes have no internet. Files are complete when it ends: sizes are compared with the
repository's, and the headers of the weights are read.
"""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from launch.arguments import expand_user_path, split_arguments
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.signals import handle_signals
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import TASKS, get_task
from wan_dist.tasks.run_config import read_config
from wan_dist.weights.published_files import (
    PUBLISHED_FILES,
    PublishedFiles,
    find_published_files,
    list_published_lines,
)


def main(arguments: list[str]) -> None:
    """Download what is named and print how to use it; raises InputError for invalid arguments."""
    options, positionals = split_arguments(arguments, ("size",))
    if not positionals and not options:
        sys.stdout.write(_list_names())
        return
    if not 1 <= len(positionals) <= 2 or any("=" in positional for positional in positionals):
        raise InputError(
            "fetch needs a task and a folder, e.g. python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B; "
            "without any it lists what there is"
        )
    folder = expand_user_path("folder", positionals[1]) if len(positionals) == 2 else None
    if (files := find_published_files(positionals[0])) is not None:
        if options:
            raise InputError(f"{files.name} is of one size; leave size={options['size']} out")
        _fetch_files(files, folder)
        return
    _fetch_checkpoint(_find_task(positionals[0]), options, folder)


def _list_names() -> str:
    return "\n".join(
        [
            "Checkpoints of tasks:",
            f"  {', '.join(_list_task_names())}",
            "Files of few-step models, for the task at the end of their name:",
            *(f"  {line}" for line in list_published_lines()),
            "",
        ]
    )


def _list_task_names() -> list[str]:
    return [name for name in TASKS if name != "toy"]


def _find_task(name: str) -> Task:
    """Return a task that has a checkpoint; raises InputError, with all names, for another one."""
    try:
        task = get_task(name)
    except InputError as error:
        raise InputError(f"{error}; few-step models: {', '.join(PUBLISHED_FILES)}") from None
    if task.name == "toy":
        raise InputError("task=toy needs no download: its model comes with the program")
    return task


def _fetch_checkpoint(task: Task, options: dict[str, str], folder: Path | None) -> None:
    config = read_config(
        [f"task={task.name}", *(f"{key}={value}" for key, value in options.items())]
    )
    assert config is not None
    width, height = config.parse_size()
    from wan_dist.weights.hub import (
        check_checkpoint_complete,
        download_checkpoint,
    )  # imports torch, which takes seconds

    with handle_signals():
        checkpoint_folder = download_checkpoint(task, area=width * height, folder=folder)
    check_checkpoint_complete(checkpoint_folder, task)
    checkpoint_setting = f"ckpt_dir={checkpoint_folder} " if folder is not None else ""
    folder_key = task.inputs.folder_key  # whose files give the size
    inputs = f"{folder_key}=FOLDER" if folder_key else f'size={width}x{height} prompt="..."'
    sys.stdout.write(
        f"{checkpoint_folder} is complete: {_format_size(_list_files(checkpoint_folder))} of "
        f"{task.choose_repository(width * height)}\n"
        f"python -m wan_dist.run task={task.name} {checkpoint_setting}{inputs}\n"
    )


def _fetch_files(files: PublishedFiles, folder: Path | None) -> None:
    from wan_dist.weights.hub import check_files_complete, download_files  # imports torch

    with handle_signals():
        downloaded_folder = download_files(files, folder=folder)
    check_files_complete(downloaded_folder, files)
    settings, paths = [], []
    for setting, names in files.files.items():
        if setting == "ckpt_dir":
            settings.append(f"ckpt_dir={downloaded_folder}")
            paths += _list_files(downloaded_folder)
        else:
            setting_paths = [downloaded_folder / name for name in names]
            settings.append(f"{setting}={','.join(map(str, setting_paths))}")
            paths += setting_paths
    image_settings = ["image=IMAGE"] if get_task(files.task).inputs.is_required else []
    command = [
        *("python -m wan_dist.run", f"task={files.task}", f"preset={files.preset}"),
        *map(shlex.quote, settings),
        *filter(None, [files.options]),
        *image_settings,
    ]
    sys.stdout.write(
        f"{downloaded_folder} holds {files.description}: {_format_size(paths)} of {files.repository}\n"
        f'{" ".join(command)} prompt="..."\n'
    )


def _list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]


def _format_size(paths: Iterable[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e9:.1f} GB"
