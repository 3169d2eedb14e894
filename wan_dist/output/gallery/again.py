"""The command that makes a video again."""

import json
import shlex

from wan_dist.config.hydra_quoting import quote, quoted
from wan_dist.output.gallery.records import Record

_USUAL: dict[str, object] = {"quant": "none", "attention": "auto", "noise_device": "cpu"}
"""What need not be said; the tests compare it with what a run does."""
_SAID_WHERE_NULL = ("negative_prompt", "sample.shift")
"""Tasks have defaults of their own for these."""


def command(record: Record) -> str:
    """Return a line for a shell: ``python -m wan_dist.run`` with every setting that the frames depend on; empty without a task."""
    if not record.task:
        return ""
    said = {
        key: value
        for key, value in record.recipe.items()
        if (value is not None or key in _SAID_WHERE_NULL) and (key not in _USUAL or value != _USUAL[key])
    }
    return shlex.join(["python", "-m", "wan_dist.run", *(_setting(key, value) for key, value in said.items())])


def _setting(key: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    if key == "prompt" and value.startswith("@"):
        value = f"@{value}"  # it is the text, and would be read as the name of a file
    is_read_otherwise = key != "task" and quote(value) == value  # such as text in quotes, and the word null
    return f"{key}={quoted(value) if is_read_otherwise else value}"
