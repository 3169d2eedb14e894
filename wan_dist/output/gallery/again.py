"""The command that makes a video again."""

import json
import shlex

from wan_dist.config.hydra_quoting import quote_if_needed, quote_text
from wan_dist.output.gallery.records import VideoRecord

_DEFAULT_SETTINGS: dict[str, object] = {"quant": "none", "attention": "auto", "noise_device": "cpu"}
"""What need not be said; the tests compare it with what a run does."""
_NULLABLE_SETTINGS = ("negative_prompt", "sample.shift")
"""Tasks have defaults of their own for these."""


def build_rerun_command(record: VideoRecord) -> str:
    """Return a line for a shell: ``python -m wan_dist.run`` with every setting that the frames depend on; empty without a task."""
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
        value = f"@{value}"  # it is the text, and would be read as the name of a file
    needs_quotes = (
        key != "task" and quote_if_needed(value) == value
    )  # such as text in quotes, and the word null
    return f"{key}={quote_text(value) if needs_quotes else value}"
