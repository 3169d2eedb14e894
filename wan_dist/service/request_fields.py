"""Fields of a request: those of OpenAI's video API, of diffusers, and our settings; imports no torch."""

import math
from collections.abc import Collection, Mapping

from wan_dist.config.checks import PATH_KEYS, PROMPT_KEYS
from wan_dist.config.overrides import is_plain_key
from wan_dist.config.schema import RunConfig, list_settings, read_all_settings
from wan_dist.config.settings import LOADING, Effect
from wan_dist.config.typed_settings import check_setting
from wan_dist.jobs.job_entries import KEY_ALIASES
from wan_dist.runtime.errors import InputError
from wan_dist.service.upload_fields import IMAGE_FIELDS, UPLOAD_FIELDS
from wan_dist.tasks.base import Task

_FIELD_KEYS = KEY_ALIASES | {
    "num_frames": "frame_num",
    "num_inference_steps": "sample.steps",
    "flow_shift": "sample.shift",
}
"""Fields that are settings under another name."""
_PRIVATE_KEYS = ("output.name", *PATH_KEYS)
"""Settings that name files of the service's machine."""
_MAX_SECONDS = 3600.0


def is_request_key(key: str) -> bool:
    """Whether a request may have a setting: one of the video alone, not of the models, and no path."""
    if not is_plain_key(key) or key in _PRIVATE_KEYS:
        return False
    effect = list_settings()[key].metadata["effect"]
    is_of_video = bool(effect & (Effect.LATENTS | Effect.RESULT)) or key == "output.save_latents"
    return is_of_video and not effect & LOADING


def describe_fields(config: RunConfig, task: Task) -> dict[str, object]:
    """Return what a request may have beside its prompt: the task's images, and settings with their defaults.

    ``config`` is the service's.
    """
    defaults = read_all_settings(config)
    settings = [
        {"name": key, "default": defaults[key], "help": field.metadata["help"]}
        for key, field in list_settings().items()
        if is_request_key(key) and key != "prompt"
    ]
    input_keys = (*task.inputs.file_keys, *task.inputs.alternative_keys)
    images = [key for key in input_keys if key in IMAGE_FIELDS]
    return {"task": task.name, "images": images, "settings": settings}


def read_request_values(
    fields: Mapping[str, object], config: RunConfig, task: Task
) -> dict[str, object]:
    """Return the settings by key that the fields of a request ask for; raises InputError.

    ``config`` is the service's.
    """
    remaining_fields = {name: value for name, value in fields.items() if value is not None}
    if not isinstance(remaining_fields.get("prompt"), str):
        raise InputError("prompt is missing; describe the video as a text")
    _check_fixed_fields(remaining_fields, task)
    values: dict[str, object] = {}
    for key, value in (
        *_read_guidance(remaining_fields, task).items(),
        *_read_duration(remaining_fields, config, task).items(),
        *((_FIELD_KEYS.get(name, name), value) for name, value in remaining_fields.items()),
    ):
        if key in values:
            raise InputError(f"{key} is given by two fields; leave one out")
        _check_key(key)
        check_setting(key, value)
        # text that begins with @ would name a file
        is_plain_at = key in PROMPT_KEYS and str(value).startswith("@")
        values[key] = f"@{value}" if is_plain_at else value
    return values


def choose_image_keys(fields: Collection[str], task: Task) -> dict[str, str]:
    """Return the setting of each uploaded image's field; raises InputError.

    ``input_reference`` is the task's first image.
    """
    keys = {field: field for field in fields}
    if "input_reference" in keys:
        image_keys = [key for key in task.inputs.file_keys if key in IMAGE_FIELDS]
        if not image_keys:
            raise InputError(f"input_reference is given, but {task.name} takes no first image")
        keys["input_reference"] = image_keys[0]
    if len(set(keys.values())) < len(keys):
        raise InputError(f"input_reference and {keys['input_reference']} are the same image")
    return keys


def _check_fixed_fields(fields: dict[str, object], task: Task) -> None:
    """Remove the fields that can have one value only; raises InputError for another one."""
    for name, expected_value, reason in (
        ("model", task.name, f"this service makes videos of {task.name}"),
        ("task", task.name, f"this service makes videos of {task.name}"),
        ("n", 1, "a request is for one video; send several"),
    ):
        value = fields.pop(name, expected_value)
        if str(value) != str(expected_value):
            raise InputError(f"{name}={value}: {reason}")


def _read_guidance(fields: dict[str, object], task: Task) -> dict[str, object]:
    """Return guide_scale from diffusers' fields, which name high noise first."""
    high_noise, low_noise = (
        fields.pop(name, None) for name in ("guidance_scale", "guidance_scale_2")
    )
    if low_noise is None:
        return {} if high_noise is None else {"sample.guide_scale": high_noise}
    if task.expert_boundary is None or high_noise is None:
        raise InputError(
            f"guidance_scale_2={low_noise} is that of a second expert, beside guidance_scale; "
            f"{task.name} has {'one transformer' if task.expert_boundary is None else 'two'}"
        )
    scales = [_read_number("guidance_scale_2", low_noise), _read_number("", high_noise)]
    return {"sample.guide_scale": scales}


def _read_duration(fields: dict[str, object], config: RunConfig, task: Task) -> dict[str, object]:
    """Return the number of frames, 4n + 1, that is nearest to the field ``seconds``."""
    seconds = fields.pop("seconds", None)
    if seconds is None:
        return {}
    if task.is_still:
        raise InputError(f"seconds={seconds}: {task.name} makes an image")
    duration = _read_number("seconds", seconds)
    if not 0 < duration <= _MAX_SECONDS:
        raise InputError(f"seconds={seconds} must be above 0, and at most {_MAX_SECONDS:.0f}")
    fps = _read_number("fps", fields.get("fps", config.fps))
    if not 0 < fps <= 1000:
        raise InputError(f"fps={fps:g} must be 1 to 1000")
    return {"frame_num": 4 * max(1, round(duration * fps / 4)) + 1}


def _read_number(name: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name}={value} is not a number")
    return number


def _check_key(key: str) -> None:
    if is_request_key(key):
        return
    if key in UPLOAD_FIELDS:
        raise InputError(f"{key} must be an uploaded file (multipart/form-data), or a data: URL")
    if key in _PRIVATE_KEYS:
        raise InputError(f"{key} cannot be set by a request: it names a file of the service")
    check_setting(key, "")  # an unknown key
    raise InputError(f"{key} applies to the whole service; give it to wan-dist serve")
