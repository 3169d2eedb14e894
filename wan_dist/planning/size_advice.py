"""Advice on a video's size: which ones a task was published for."""

from wan_dist.tasks.base import Task


def advise_on_size(task: Task, size: tuple[int, int], *, has_own_aspect: bool) -> str | None:
    """Return a warning for a size (width, height) that the task was not published for, else None.

    ``has_own_aspect``: the inputs decide on it, so that the area alone counts.
    """
    areas = {width * height for width, height in task.published_sizes}
    if not areas or size in task.published_sizes:
        return None
    if has_own_aspect and max(areas) >= size[0] * size[1] >= 0.9 * min(areas):
        return None
    size_list = ", ".join(f"{width}x{height}" for width, height in task.published_sizes)
    return (
        f"{task.name} was published for the sizes {size_list}; "
        f"{size[0]}x{size[1]} works but may look worse"
    )
