"""Scales and rotations of 8-bit weights in files, as ComfyUI, LightX2V and others store them.

Weights are stored value * scale in float32, with one scale for the tensor, for each row, or in
TurboDiffusion's files for each tile of 128 x 128. Which formats there are, and their keys:
comfy/quant_ops.py of ComfyUI and comfy_kitchen.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from wan_dist.runtime.errors import InputError
from wan_dist.weights.tensor_file import Shape, format_first_ten

_EIGHT_BIT_TYPES = ("F8_E4M3", "F8_E5M2", "I8")
_SCALE_TYPES = ("F64", "F32", "F16", "BF16")
_SCALE_NAMES = ("scale_weight", "weight_scale")
INT8_TILES_NAME = "int8_weight"
"""Name, instead of ``weight``, of a weight that TurboDiffusion has quantised; its scales are ``scale``."""
_TILE_SIZE = 128
_ACTIVATION_SCALE_NAMES = ("scale_input", "input_scale")
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
"""ComfyUI's names of the formats that are read, and the types of their tensors."""
_FOREIGN_KEYS = (
    (r"\.quant_state\.bitsandbytes__|\.weight\.absmax$", "bitsandbytes nf4 or fp4"),
    (r"\.SCB$", "bitsandbytes int8"),
    (r"\.weight_scale_2$|\.weight_global_scale$", "nvfp4"),
    (r"\.wscales$|\.wtscale$", "Nunchaku (SVDQuant)"),
    (r"\.qzeros$|\.qweight$", "AWQ or GPTQ"),
    (r"\.weight\._(?:data|scale)$", "quanto"),
    (r"_quantizer\._", "NVIDIA ModelOpt"),
    (r"_weight_qdata$|\.weight_qdata$", "torchao"),
)
"""Patterns of keys that only files of unsupported formats have, and the formats' names."""


@dataclass(frozen=True)
class WeightScale:
    """Where the scales of an 8-bit weight are, and how they apply."""

    key: str
    rotation_size: int = 0
    """In groups of how many columns the weight is rotated; 0: it is not."""
    tile_size: int = 0
    """Rows and columns of the tiles that have a scale each; 0: one for the tensor, or for each row."""

    def select_rows(self, scales: Tensor, start: int, stop: int) -> Tensor:
        """Return the scales of a weight's rows from ``start`` to before ``stop``: (1, 1), (n, 1) or (n, k).

        k is the number of tiles of a row.
        """
        if self.tile_size:
            return scales[torch.arange(start, stop) // self.tile_size]
        scales = scales.reshape(-1, 1)
        return scales if len(scales) == 1 else scales[start:stop]

    def decode_rows(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Return rows (n, ...) of a weight, float32, from what is stored and the scales of `select_rows`."""
        matrix = rows.reshape(len(rows), -1)
        if self.tile_size:
            scales = scales.repeat_interleave(self.tile_size, dim=1)[:, : matrix.shape[1]]
        values = matrix.float() * scales
        if self.rotation_size:
            values = rotate_back(values, self.rotation_size)
        return values.view(rows.shape)


@dataclass(frozen=True)
class Quantization:
    """How the 8-bit weights of files are stored, by their names, and the keys that are not weights."""

    scales: Mapping[str, WeightScale]
    extra_keys: frozenset[str]
    """Scales that are applied, those of activations, markers and descriptions."""


def find_quantization(
    shapes: Mapping[str, Shape],
    type_names: Mapping[str, str],
    metadata: Mapping[str, Any],
    read: Callable[[str], Tensor],
) -> Quantization:
    """Return how a file's 8-bit weights are stored.

    Raises InputError, without the file's name, for a format that is not read, for scales that are missing
    although the file says that there are some, and for scales of a wrong shape. Nothing but descriptions in
    JSON is read.
    """
    _check_foreign_keys(shapes)
    formats, format_keys = _read_layer_formats(shapes, metadata, read)
    scales = {}
    for name, type_name in type_names.items():
        if type_name in _EIGHT_BIT_TYPES and (key := _find_scale_key(name, shapes)):
            rotation_size = _check_format(name, type_name, shapes[name], formats)
            tile_size = _TILE_SIZE if _is_tiled(name) else 0
            _check_scale(name, key, shapes, type_names, tile_size)
            scales[name] = WeightScale(key, rotation_size, tile_size)
    marker_keys = [key for key in shapes if key.rpartition(".")[2] == "scaled_fp8"]
    _check_all_scaled(shapes, type_names, scales, formats, has_marker=bool(marker_keys))
    activation_keys = [key for key in shapes if key.rpartition(".")[2] in _ACTIVATION_SCALE_NAMES]
    extra_keys = (*format_keys, *marker_keys, *activation_keys)
    return Quantization(scales, frozenset(extra_keys).union(scale.key for scale in scales.values()))


def _check_foreign_keys(keys: Iterable[str]) -> None:
    for key in keys:
        for pattern, description in _FOREIGN_KEYS:
            if re.search(pattern, key):
                raise _make_format_error(description, key)


def _make_format_error(description: str, key: str) -> InputError:
    return InputError(
        f"it is quantised as {description}, which is not supported ({key}); "
        "use the same model in bf16, fp16, fp8, int8 or GGUF"
    )


def _get_module(name: str) -> str:
    return name.removesuffix("weight").removesuffix(".")


def _is_tiled(name: str) -> bool:
    return name.rpartition(".")[2] == INT8_TILES_NAME


def _find_scale_key(name: str, shapes: Mapping[str, Shape]) -> str | None:
    stem = name.removesuffix(INT8_TILES_NAME if _is_tiled(name) else "weight")
    scale_names = ("scale",) if _is_tiled(name) else _SCALE_NAMES
    return next((key for part in scale_names if (key := f"{stem}{part}") in shapes), None)


def _read_layer_formats(
    shapes: Mapping[str, Shape], metadata: Mapping[str, Any], read: Callable[[str], Tensor]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return ComfyUI's descriptions of modules, by their names in the file, and their keys.

    Names in the header may lack the prefix that the tensors have.
    """
    formats: dict[str, dict[str, Any]] = {}
    if text := metadata.get("_quantization_metadata"):
        layers = _parse_json("_quantization_metadata", str(text)).get("layers")
        named_layers = layers if isinstance(layers, dict) else {}
        for module in map(_get_module, shapes):
            for key in (module, module.partition("diffusion_model.")[2]):
                if key in named_layers:
                    formats[module] = named_layers[key]
    keys = [key for key in shapes if key.endswith(".comfy_quant")]
    for key in keys:
        text = bytes(read(key).flatten().view(torch.uint8).tolist()).decode(errors="replace")
        formats[key.removesuffix(".comfy_quant")] = _parse_json(key, text)
    for module, layer_format in formats.items():
        format_name = layer_format.get("format") if isinstance(layer_format, dict) else None
        if format_name not in _FORMATS:
            raise _make_format_error(str(format_name), module)
    return formats, keys


def _parse_json(key: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{key} is not a JSON object; download it again")
    return content


def _check_format(
    name: str, type_name: str, shape: Shape, formats: Mapping[str, dict[str, Any]]
) -> int:
    """Return in groups of how many columns a weight is rotated, 0 for one that is not rotated."""
    layer_format = formats.get(_get_module(name), {})
    format_name = layer_format.get("format")
    if format_name is not None and _FORMATS[format_name] != type_name:
        raise InputError(
            f"{name} is of {type_name}, but said to be {format_name}; download it again"
        )
    if not layer_format.get("convrot"):
        return 0
    size = layer_format.get("convrot_groupsize", 256)
    if type(size) is not int or 4 ** (size.bit_length() // 2) != size or size < 4:
        raise InputError(f"{name} is rotated in groups of {size}, which is no power of 4")
    if len(shape) != 2 or shape[1] % size:
        raise InputError(f"{name} {shape} is said to be rotated in groups of {size} columns")
    return size


def _check_scale(
    name: str,
    key: str,
    shapes: Mapping[str, Shape],
    type_names: Mapping[str, str],
    tile_size: int,
) -> None:
    """Raise InputError for scales that are not one for the tensor, one for each row or one for each tile."""
    if type_names[key] not in _SCALE_TYPES:
        # One exponent for 32 values, or a scale in 8 bits for 16: OCP's microscaling formats.
        description = "nvfp4" if type_names[key] == "F8_E4M3" else "mxfp8"
        raise _make_format_error(description, key)
    if tile_size:
        num_tiles = tuple(-(-length // tile_size) for length in shapes[name])
        if len(num_tiles) != 2 or shapes[key] != num_tiles:
            raise InputError(
                f"{key} has shape {shapes[key]}; a tensor of {shapes[name]} in tiles of {tile_size} "
                f"x {tile_size} has scales of {num_tiles}; download it again"
            )
    elif prod(shapes[key]) not in (1, *shapes[name][:1]):
        raise InputError(
            f"{key} has shape {shapes[key]}; "
            f"scales of a tensor of {shapes[name]} are one, or one a row"
        )


def _check_all_scaled(
    shapes: Mapping[str, Shape],
    type_names: Mapping[str, str],
    scales: Mapping[str, WeightScale],
    formats: Mapping[str, object],
    *,
    has_marker: bool,
) -> None:
    """Raise InputError for 8-bit matrices without scales in a file that says that they have some."""
    unscaled_names = [
        name
        for name, type_name in type_names.items()
        if type_name in _EIGHT_BIT_TYPES and name not in scales and len(shapes[name]) == 2
    ]
    described_names = [
        name
        for name in unscaled_names
        if has_marker or _get_module(name) in formats or _is_tiled(name)
    ]
    if described_names:
        source = "its key scaled_fp8 says" if has_marker else "its quantisation is said to be such"
        raise InputError(
            f"{source} that 8-bit weights have scales, and {len(described_names)} have none: "
            f"{format_first_ten(described_names)}; without them the values are wrong; "
            "download it again, or use another file of the model"
        )


def rotate_back(weight: Tensor, size: int) -> Tensor:
    """Return rows (n, k) of a weight that ConvRot has rotated, in the original basis.

    Groups of ``size`` columns are multiplied by the normalised regular Hadamard matrix, the Kronecker power
    of H4, which is symmetric and thus its own inverse (arXiv 2512.03673; tensor/int8_utils.py of
    comfy_kitchen).
    """
    matrix = _build_hadamard(size).to(weight.device)
    return (weight.unflatten(1, (-1, size)) @ matrix).flatten(1)


@lru_cache
def _build_hadamard(size: int) -> Tensor:
    factor = (1 - 2 * torch.eye(4).flip(0)) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, factor)
    return matrix
