"""Rerun command of a video."""

import json
import shlex

from wan_dist.config.hydra_quoting import quote_if_needed, quote_text
from wan_dist.config.settings import GROUP_KEYS
from wan_dist.output.gallery.records import GalleryVideo

_DEFAULT_SETTINGS: dict[str, object] = {"quant": "none", "attention": "auto", "noise_device": "cpu"}
"""Default values that are omitted; the tests compare them with a run's defaults."""
_NULLABLE_SETTINGS = ("negative_prompt", "sample.shift")
"""Settings whose null is written, as tasks have defaults of their own for them."""


def build_rerun_command(record: GalleryVideo) -> str:
    """Return a shell command that makes the video again, empty for a record without a task.

    It is ``python -m wan_dist.run`` with every setting that the frames depend on.
    """
    if not record.task:
        return ""
    changed_settings = {
        key: value
        for key, value in record.result_settings.items()
        if (value is not None or key in _NULLABLE_SETTINGS)
        and (key not in _DEFAULT_SETTINGS or value != _DEFAULT_SETTINGS[key])
    }
    return shlex.join(
        [
            "python",
            "-m",
            "wan_dist.run",
            *(_format_setting(key, value) for key, value in changed_settings.items()),
        ]
    )


def _format_setting(key: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    if key == "prompt" and value.startswith("@"):
        value = f"@{value}"  # escaped: the prompt itself, not the name of a file
    # text in quotes, or the word null, that Hydra would read as something else
    needs_quotes = key not in GROUP_KEYS and quote_if_needed(value) == value
    return f"{key}={quote_text(value) if needs_quotes else value}"
