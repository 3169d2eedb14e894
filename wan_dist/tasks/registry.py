"""Registry of the tasks.

Defaults of a run (frames, steps, guidance ...) are in ``conf/task/*.yaml``; the modules of the tasks hold
what the user cannot change.
"""

from collections.abc import Iterable

from wan_dist.runtime.errors import InputError, suggest_nearest
from wan_dist.tasks import animate, animate_2, fun, image, known_first_frame, speech, text, vace
from wan_dist.tasks.base import Task

TASKS = {
    task.name: task
    for task in (
        *text.TASKS,
        *image.TASKS,
        *vace.TASKS,
        *fun.TASKS,
        *animate.TASKS,
        *animate_2.TASKS,
        *speech.TASKS,
        *known_first_frame.TASKS,
    )
}


def get_task(name: str) -> Task:
    """Return the task called ``name``; raises InputError if it does not exist."""
    if name in TASKS:
        return TASKS[name]
    supported_names = ", ".join(TASKS)
    hint = suggest_nearest(name, TASKS)
    raise InputError(f"there is no task {name!r}{hint} (supported: {supported_names})")


def require_task(arguments: Iterable[str]) -> None:
    """Raise InputError unless ``task=NAME`` is among the arguments and NAME is a supported task."""
    task_names = [
        argument.partition("=")[2] for argument in arguments if argument.startswith("task=")
    ]
    if not task_names:
        raise InputError(f"task is missing: give task=NAME, one of {', '.join(TASKS)} (see --help)")
    get_task(task_names[-1])
