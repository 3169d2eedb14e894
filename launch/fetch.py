"""Download the checkpoint of a task, and nothing else; an interrupted download resumes.

    python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B
    python -m launch fetch i2v-14B /shared/Wan2.1-I2V-14B-720P size=1280x720   # the one for this size
    python -m launch fetch t2v-1.3B                                            # into Hugging Face's cache

For machines whose nodes have no internet. Files are complete when it ends: sizes are compared with the
repository's, and the headers of the weights are read.
"""

import sys

from launch.arguments import expand_user_path, split_arguments
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.signals import handle_signals
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config


def main(arguments: list[str]) -> None:
    """Download the checkpoint and print how to use it; raises InputError for invalid arguments."""
    options, positionals = split_arguments(arguments, ("size",))
    if not 1 <= len(positionals) <= 2 or any("=" in positional for positional in positionals):
        raise InputError(
            "fetch needs a task and a folder, e.g. python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B"
        )
    task = get_task(positionals[0])
    if task.name == "toy":
        raise InputError("task=toy needs no download: its model comes with the program")
    folder = expand_user_path("folder", positionals[1]) if len(positionals) == 2 else None
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
    num_bytes = sum(
        file.stat().st_size
        for file in checkpoint_folder.rglob("*")
        if file.is_file() and ".cache" not in file.parts
    )
    checkpoint_setting = f"ckpt_dir={checkpoint_folder} " if folder is not None else ""
    sys.stdout.write(
        f"{checkpoint_folder} is complete: {num_bytes / 1e9:.1f} GB of "
        f"{task.choose_repository(width * height)}\n"
        f'python -m wan_dist.run task={task.name} {checkpoint_setting}size={width}x{height} prompt="..."\n'
    )
