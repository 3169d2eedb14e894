"""Download what a task needs, and nothing else, for machines without internet; what was interrupted goes on where it stopped.

    python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B
    python -m launch fetch i2v-14B /shared/Wan2.1-I2V-14B-720P size=1280*720     # the checkpoint for this size
    python -m launch fetch t2v-1.3B                                              # into the Hugging Face cache

Files are complete when it ends: sizes are compared with the repository's, and the headers of the weights are read.
"""

import sys

from launch.arguments import parted, path_of
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.signals import heed_signals
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import configured


def main(arguments: list[str]) -> None:
    """Download and say how to use it; raises InputError for what cannot be."""
    given, places = parted(arguments, ("size",))
    if not 1 <= len(places) <= 2 or any("=" in place for place in places):
        raise InputError("fetch takes a task and a folder, e.g. python -m launch fetch t2v-14B /shared/Wan2.1-T2V-14B")
    task = get_task(places[0])
    if task.name == "toy":
        raise InputError("task toy needs no download: its model is made when it is first used")
    folder = path_of("folder", places[1]) if len(places) == 2 else None
    config = configured([f"task={task.name}", *(f"{key}={value}" for key, value in given.items())])
    assert config is not None
    width, height = config.width_height()
    from wan_dist.weights.hub import check_whole, download  # they import torch, which takes seconds

    with heed_signals():
        found = download(task, area=width * height, folder=folder)
    check_whole(found, task)
    size = sum(file.stat().st_size for file in found.rglob("*") if file.is_file() and ".cache" not in file.parts)
    use = f"ckpt_dir={found} " if folder is not None else ""
    sys.stdout.write(
        f"{found} is whole: {size / 1e9:.1f} GB of {task.hub_repository(width * height)}\n"
        f'python -m wan_dist.run task={task.name} {use}size={width}*{height} prompt="..."\n'
    )
