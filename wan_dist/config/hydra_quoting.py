"""Text in other places: as Hydra and OmegaConf give it back exactly, and as part of a file's name."""

import re


def quote_if_needed(value: str) -> str:
    """Quote ``value`` so that Hydra and OmegaConf give back exactly this text; ``null`` and quoted text are left as they are."""
    if value in ("", "null") or re.fullmatch(
        r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", value, re.DOTALL
    ):
        return value
    return quote_text(value)


def quote_text(value: str) -> str:
    """Quote ``value``, whatever it is; see `quote`."""
    value = re.sub(
        r"(\\*)\$\{", r"\1\1\\${", value
    )  # OmegaConf: an escaped interpolation is plain text
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # Hydra: backslashes count only before a quote
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    return f"'{value}'"
