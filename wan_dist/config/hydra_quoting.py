"""Text quoting for Hydra and OmegaConf, which then return exactly the text that was given."""

import re


def quote_if_needed(value: str) -> str:
    """Quote ``value`` so that Hydra and OmegaConf return exactly this text.

    ``null``, an empty string and quoted text are left as they are.
    """
    if value in ("", "null") or re.fullmatch(
        r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", value, re.DOTALL
    ):
        return value
    return quote_text(value)


def quote_text(value: str) -> str:
    """Quote ``value``, whatever it is; see `quote_if_needed`."""
    # OmegaConf: an escaped interpolation is plain text
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # Hydra: backslashes count only before a quote
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    return f"'{value}'"
