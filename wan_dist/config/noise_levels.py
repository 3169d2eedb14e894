"""Settings that are noise levels, given one by one; no torch."""

import math
from itertools import pairwise
from typing import Any

from wan_dist.runtime.errors import InputError

TIMESTEP_FORMATS = ("integer", "float", "bfloat16")


def check_sigmas(value: Any) -> None:
    """Raise InputError unless ``value`` is None or a list of decreasing noise levels in (0, 1]."""
    if value is None:
        return
    is_decreasing = (
        isinstance(value, list)
        and bool(value)
        and all(map(_is_number, value))
        and all(first > second for first, second in zip(value, [*value[1:], 0.0], strict=True))
        and value[0] <= 1
    )
    if not is_decreasing:
        raise InputError(
            f"sample.sigmas={value} is not a list of noise levels that decrease from at most 1 and stay "
            "above 0, e.g. [1.0,0.94,0.83,0.63]"
        )


def check_timesteps(value: Any) -> None:
    """Raise InputError unless ``value`` is None, a format, or a list of decreasing numbers in [0, 1000]."""
    if value is None or (isinstance(value, str) and value in TIMESTEP_FORMATS):
        return
    is_decreasing = (
        isinstance(value, list)
        and bool(value)
        and all(map(_is_number, value))
        and all(first > second for first, second in pairwise(value))
        and value[0] <= 1000
        and value[-1] >= 0
    )
    if not is_decreasing:
        raise InputError(
            f"sample.timesteps={value} is neither {', '.join(TIMESTEP_FORMATS)} nor a list of numbers that "
            "decrease from at most 1000, e.g. [1000,757,522]"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
