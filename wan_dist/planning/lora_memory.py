"""Memory of merging LoRAs into weights as they are read, from the headers of the files; no torch."""

from collections.abc import Sequence
from math import prod

from safetensors import SafetensorError, safe_open

from wan_dist.config.loras import LoraSetting
from wan_dist.models.dims import TransformerDims
from wan_dist.planning.workload import FLOAT_BYTES
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

MERGED_ROWS = 512
"""Rows of a weight that are merged at once."""
_ROWS_COPIES = 5
"""Copies of these rows in float32: as read, the sum of updates, an update, its parts."""
_NUM_FACTORS = 2
"""Factors of an update in float32 at once."""
_DIFFERENCE_SUFFIXES = (".diff", ".diff_b", ".diff_m")


def estimate_merging_bytes(settings: Sequence[LoraSetting], dims: TransformerDims) -> int:
    """Return the bytes on the device while one weight is read and merged, 0 without LoRAs.

    The files are mapped, not held: of each, the factors of the module in question are read. Raises
    InputError for a file that cannot be read.
    """
    if not settings:
        return 0
    rows_bytes = MERGED_ROWS * max(dims.dim, dims.ffn_dim) * FLOAT_BYTES
    return _ROWS_COPIES * rows_bytes + _NUM_FACTORS * max(
        map(_count_largest_factor_bytes, settings)
    )


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
            prod([MERGED_ROWS, *shape[1:]] if key.endswith(_DIFFERENCE_SUFFIXES) else shape)
            for key, shape in shapes.items()
        ),
        default=0,
    )
