"""Settings given as values, as a job file or Python has them, in place of words of a command line."""

import json

from wan_dist.config.arguments import check_setting_key, is_text_key
from wan_dist.config.checks import FILE_LIST_KEYS, PROMPT_KEYS, check_prompt_length
from wan_dist.config.hydra_quoting import quote_if_needed, quote_text
from wan_dist.runtime.errors import InputError


def check_setting(key: str, value: object) -> None:
    """Raise InputError for an unknown setting, or a value that it cannot have.

    A job file is data: nothing in it is evaluated, hence no ``${...}``.
    """
    if not isinstance(value, str | int | float | list | tuple | dict | None):
        raise InputError(f"{key} is a {type(value).__name__}; give a number, a text or a list")
    if isinstance(value, dict):
        raise InputError(f"{key} is an object; write its keys with dots, as sample.steps")
    check_setting_key(key)
    is_file_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if is_text_key(key) and not (key in FILE_LIST_KEYS and is_file_list):
        if isinstance(value, bool | list):
            raise InputError(f"{key}={json.dumps(value)} is not text; write it in quotes")
        if key in PROMPT_KEYS:
            check_prompt_length(key, str(value))
    elif "${" in json.dumps(value):
        raise InputError(
            f"{key}={json.dumps(value)} contains ${{, which job files do not evaluate; write the value"
        )


def format_override(key: str, value: object) -> str:
    """Return a setting as on the command line, quoted such that Hydra reads the same value."""
    if value is None:
        return f"{key}=null"
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    # text in quotes, or null, that Hydra would read as something else
    needs_quotes = is_text_key(key) and quote_if_needed(value) == value
    return f"{key}={quote_text(value) if needs_quotes else value}"
