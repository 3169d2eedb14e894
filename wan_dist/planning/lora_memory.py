"""Memory of merging LoRAs into weights as they are read, from the headers of the files; no torch."""

import math
from collections.abc import Sequence
from math import prod

from safetensors import SafetensorError, safe_open

from wan_dist.config.loras import LoraSetting
from wan_dist.planning.workload import FLOAT_BYTES
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

MERGED_VALUES = 2**23
"""Values of a weight that are merged at once."""
_NUM_COPIES = 5
"""Copies of these values in float32: as read, the sum of updates, an update, its parts."""
_DIFFERENCE_SUFFIXES = (".diff", ".diff_b", ".diff_m")


def count_merged_rows(num_columns: int) -> int:
    """Return how many rows of a weight are merged at once."""
    return max(1, MERGED_VALUES // num_columns)


def estimate_merging_bytes(settings: Sequence[LoraSetting]) -> int:
    """Return the bytes on the device while one weight is read and merged, 0 without LoRAs.

    The files are mapped, not held: of each, one factor of the module in question is held, and rows of the
    other are read. Raises InputError for a file that cannot be read.
    """
    if not settings:
        return 0
    factor_bytes = [_count_largest_factor_bytes(setting) for setting in settings]
    return _NUM_COPIES * MERGED_VALUES * FLOAT_BYTES + sum(factor_bytes) + max(factor_bytes)


def _count_largest_factor_bytes(setting: LoraSetting) -> int:
    """Return the bytes of a file's largest factor in float32; of a difference only rows are read at once."""
    try:
        check_regular_file(setting.path)
        with safe_open(setting.path, framework="numpy") as opened_file:
            shapes = {key: opened_file.get_slice(key).get_shape() for key in opened_file.keys()}  # noqa: SIM118  # it is no dict
    except UnreadableFileError as error:
        raise InputError(f"{setting} cannot be read: {error}") from None
    except (
        OSError,
        SafetensorError,
    ):  # of PyTorch's format, or damaged, as is said when it is opened
        return setting.path.stat().st_size
    return FLOAT_BYTES * max(
        (
            min(prod(shape), MERGED_VALUES if key.endswith(_DIFFERENCE_SUFFIXES) else math.inf)
            for key, shape in shapes.items()
        ),
        default=0,
    )
