"""Input files of tasks, by the settings that name them; no torch."""

from collections.abc import Mapping

from wan_dist.config.settings import SettingValues
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.animate import FOLDER_KEY, list_folder_files
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import TASKS

INPUT_KEYS = tuple(dict.fromkeys(key for task in TASKS.values() for key in task.inputs.file_keys))
"""Settings that name input files of any task."""


def list_input_files(settings: SettingValues) -> dict[str, str]:
    """Return the input files of the settings, by setting; `split_files` splits those of a list.

    A folder of them stands for its files, unless they are given by name.
    """
    files = {key: file for key in INPUT_KEYS if (file := settings.get(key)) is not None}
    if (folder := settings.get(FOLDER_KEY)) is not None:
        files = list_folder_files(folder, is_replacing=settings.get("replace_flag", False)) | files
    return files


def check_input_files(input_files: Mapping[str, str], task: Task) -> None:
    """Raise InputError for files that the task needs and are missing, and for unexpected ones.

    ``input_files``: see `list_input_files`.
    """
    inputs = task.inputs
    inputs.check_keys(input_files)
    task_keys = inputs.choose_keys(input_files)
    if unexpected_keys := [key for key in input_files if key not in task_keys]:
        if set(unexpected_keys) <= set(inputs.file_keys):
            raise InputError(
                f"{' and '.join(input_files)} are given, but {task.name} takes {inputs.usage}"
            )
        accepting_tasks = [
            other_task.family
            for other_task in TASKS.values()
            if unexpected_keys[0]
            in (*other_task.inputs.file_keys, *other_task.inputs.alternative_keys)
            and other_task.repository
        ]
        raise InputError(
            f"{unexpected_keys[0]} is given, but {task.name} takes {inputs.usage}; "
            f"{', '.join(dict.fromkeys(accepting_tasks))} would take {unexpected_keys[0]}"
        )
    missing_keys = [key for key in task_keys if key not in input_files]
    if missing_keys and inputs.is_required:
        verb = "is" if len(missing_keys) == 1 else "are"
        raise InputError(
            f"{' and '.join(missing_keys)} {verb} missing: {task.name} takes {inputs.usage}"
        )
