"""Check of the output of tasks that make an image; no torch."""

from wan_dist.config.output_section import DEFAULT_VIDEO, OutputConfig
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task


def check_still_output(output: OutputConfig, task: Task) -> None:
    """Raise InputError for settings of a video's file where the task makes an image."""
    given = [key for key in ("crf", "audio") if getattr(output, key) is not None]
    given += ["video"] if output.video != DEFAULT_VIDEO else []
    if task.is_still and given:
        raise InputError(
            f"output.{given[0]}={getattr(output, given[0])} is for videos, and {task.name} makes an "
            "image, saved as PNG; leave it out"
        )
