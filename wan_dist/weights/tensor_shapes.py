"""What dims are read off: shapes of a checkpoint's tensors, and entries of its config."""

import re
from collections.abc import Mapping
from typing import Any

from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles
from wan_dist.weights.key_maps import KeyMap

_MAX_LAYERS = 256
"""Six times as many as the published models have: a damaged file should not have a million layers built."""


class TensorShapes:
    """Shapes of the checkpoint's tensors by our parameter names, in either layout."""

    def __init__(self, files: TensorFiles, key_map: KeyMap) -> None:
        self.files = files
        self.key_map = key_map

    def get_shape(self, name: str, rank: int) -> Shape:
        """Return a tensor's shape; raises InputError if it is missing or has not ``rank`` dims."""
        shape = self.get_shape_of_min_rank(name, rank)
        if len(shape) != rank:
            raise self._make_rank_error(name, shape, rank)
        return shape

    def get_shape_of_min_rank(self, name: str, min_rank: int) -> Shape:
        """Return a shape of at least ``min_rank`` dims, none of length 0; raises InputError otherwise."""
        key = self.key_map.find_sources(name)[0].key
        if key not in self.files.shapes:
            raise InputError(f"{self.files} has no {key}: it is not the expected kind of model")
        shape = self.files.shapes[key]
        if len(shape) < min_rank or 0 in shape:
            raise self._make_rank_error(name, shape, min_rank)
        return shape

    def get_size_or_zero(self, name: str, rank: int, dim: int) -> int:
        """Return the length of a tensor's dim, 0 where the checkpoint holds no such tensor."""
        return self.get_shape(name, rank)[dim] if name in self else 0

    def _make_rank_error(self, name: str, shape: Shape, rank: int) -> InputError:
        key = self.key_map.find_sources(name)[0].key
        description = f"{self.files} holds {key} of shape {shape}, not of {rank} dims"
        return InputError(f"{description}: it is not the expected kind of model")

    def __contains__(self, name: str) -> bool:
        return self.key_map.find_sources(name)[0].key in self.files.shapes

    def count_layer_indices(self, pattern: str) -> int:
        """Return the number of distinct layer indices that the pattern's first group matches in the keys."""
        return len(
            {match[1] for match in (re.search(pattern, key) for key in self.files.shapes) if match}
        )


class ConfigReader:
    """Entries of a config.json, validated because people edit the file."""

    def __init__(self, entries: Mapping[str, Any], files: TensorFiles) -> None:
        self.entries = entries
        self.files = files

    def read_positive_int(self, *keys: str, default: int, maximum: int = 2**20) -> int:
        """Return the first given entry of ``keys``; raises InputError unless it is from 1 to ``maximum``."""
        for key in keys:
            value = self.entries.get(key)
            if value is not None and (type(value) is not int or not 1 <= value <= maximum):
                raise self.make_error(f"{key}={value!r}, which is not a number from 1 to {maximum}")
            if value is not None:
                return value
        return default

    def read_num_layers(self, key: str, num_stored: int) -> int:
        """Return the configured number of layers, by default that of the stored ones.

        `check_keys` checks later whether all of them are stored.
        """
        return self.read_positive_int(
            key, default=min(num_stored, _MAX_LAYERS), maximum=_MAX_LAYERS
        )

    def make_error(self, problem: str) -> InputError:
        """Return the InputError for an entry."""
        return InputError(f"config.json beside {self.files} says {problem}; download it again")
