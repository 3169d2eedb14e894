"""Weight loading from checkpoint files into a model on the meta device, one tensor at a time.

Strict: `check_keys` refuses tensors that are missing, unexpected, misshapen or not of floats. Reading one at
a time bounds host memory by the largest.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from wan_dist.models.gguf_linear import PART_NAME
from wan_dist.models.kernels.quantized_linear import QUANTIZED_PARTS as QUANTIZED_PARTS
from wan_dist.models.kernels.quantized_linear import find_quantization, quantize_rows
from wan_dist.planning.lora_memory import count_merged_rows
from wan_dist.planning.read_memory import READ_VALUES
from wan_dist.runtime.errors import InputError
from wan_dist.weights.device_copy import copy_to_device, run_readers
from wan_dist.weights.files import Shape, TensorFiles, format_first_ten
from wan_dist.weights.key_maps import KeyMap, TensorSource

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_keys(models: Sequence[nn.Module], files: TensorFiles, key_map: KeyMap) -> list[str]:
    """Raise one InputError with all mismatches between the models' parameters and the files' tensors.

    Names, shapes and types are compared; no tensor is read. Returns the keys that are not needed.
    """
    expected_keys: set[str] = set()
    missing_keys, misshapen_keys, mistyped_keys = [], [], []
    for name, parameter in chain.from_iterable(model.named_parameters() for model in models):
        sources = key_map.find_sources(name)
        for source in sources:
            expected_keys.add(source.key)
            expected_shape = (
                parameter.shape[0] // len(sources) * source.num_parts,
                *parameter.shape[1:],
            )
            if source.key not in files.shapes:
                missing_keys.append(source.key)
            elif not _is_shape_compatible(files.shapes[source.key], expected_shape):
                misshapen_keys.append(
                    f"{source.key} {files.shapes[source.key]}, not {expected_shape}"
                )
            elif source.key in files.non_float_types:
                mistyped_keys.append(f"{source.key} ({files.non_float_types[source.key]})")
    other_keys = [key for key in files.shapes if key not in expected_keys]
    unexpected_keys = [key for key in other_keys if not key_map.is_ignored(key)]
    mismatches = [
        f"{len(items)} {kind}: {format_first_ten(items)}"
        for kind, items in (
            ("missing", missing_keys),
            ("unexpected", unexpected_keys),
            ("of the wrong shape", misshapen_keys),
            ("of numbers that are no floats", mistyped_keys),
        )
        if items
    ]
    if mismatches:
        raise InputError(
            f"{files} does not have the tensors of a {type(models[0]).__name__}; "
            f"{'; '.join(mismatches)}"
        )
    return other_keys


def _is_shape_compatible(stored_shape: Shape, expected_shape: Shape) -> bool:
    """Whether the shapes are equal but for leading dims of length 1, which some checkpoints have.

    So may a vector have dims of length 1 behind it, as a bias of images.

    A convolution whose stride is its kernel may be stored as the linear that it is, as rCM does.
    """
    if len(expected_shape) == 5 and stored_shape == (expected_shape[0], prod(expected_shape[1:])):
        return True
    if len(expected_shape) == 1 < len(stored_shape) and stored_shape[-1] == 1:
        return prod(stored_shape) == max(stored_shape) == expected_shape[0]
    num_extra_dims = len(stored_shape) - len(expected_shape)
    return (
        num_extra_dims >= 0
        and stored_shape[num_extra_dims:] == expected_shape
        and set(stored_shape[:num_extra_dims]) <= {1}
    )


@torch.no_grad()
def fill_model(
    model: nn.Module,
    files: TensorFiles,
    key_map: KeyMap,
    device: torch.device,
    *,
    skip_prefixes: tuple[str, ...] = (),
) -> nn.Module:
    """Give the model's meta parameters the files' values, in each parameter's own dtype, on ``device``.

    Parameters whose names begin with one of ``skip_prefixes`` are not changed. Of a sharded parameter only
    this rank's rows are read. Memory holds at most the model and some rows of a few tensors, see
    `planning/read_memory.py`. `check_keys` must have passed.
    """
    if any(map(_is_sharded, model.parameters())):
        model.to_empty(device=device)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(skip_prefixes)
    }
    local_parts = {key: _get_local(part, device) for key, part in parameters.items()}
    run_readers(
        [
            partial(
                _fill_rows,
                [local_parts[key] for key in part_names],
                _find_first_row(parameters[name]),
                parameters[name].shape[0],
                files,
                _find_sources(name, key_map),
                device,
            )
            for name, part_names in _group_quantized_parts(parameters)
        ],
        device,
    )
    for key, part in parameters.items():
        if not _is_sharded(part):
            _set_tensor(model, key, nn.Parameter(local_parts[key], requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        _set_tensor(model, name, buffer.to(device))
    return model.eval().requires_grad_(False)


def _is_sharded(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Whether FSDP shards a parameter."""
    # Its import takes 2 s, and before its end, which a thread may be at, there are none.
    tensor_class = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return tensor_class is not None and isinstance(parameter, tensor_class)


def _get_local(parameter: Tensor, device: torch.device) -> Tensor:
    """Return the tensor to fill: this rank's shard of a sharded parameter, else a new one on ``device``."""
    if _is_sharded(parameter):
        return parameter.to_local()
    # Not empty_like, which imports sympy for a meta tensor.
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)


def _find_first_row(parameter: Tensor) -> int:
    """Return the row of the whole parameter with which this rank's shard begins, 0 without sharding."""
    if not _is_sharded(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, global_offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return global_offset[0]


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer of the model, by its full name."""
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, value)


def fill_parameters(
    parameters: Mapping[str, Tensor], files: TensorFiles, key_map: KeyMap, device: torch.device
) -> None:
    """Read the files' values into parameters, given by their names in the model.

    Quantised ones are computed on ``device``.
    """
    for name, part_names in _group_quantized_parts(parameters):
        _fill_rows(
            [parameters[key] for key in part_names],
            0,
            parameters[name].shape[0],
            files,
            _find_sources(name, key_map),
            device,
        )


def _group_quantized_parts(names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of parameters that the files hold, each with the names of those computed from it.

    These are the parameter alone, or of a quantised linear the weight and its scales.
    """
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        part_names = [key for part in QUANTIZED_PARTS if (key := f"{module_name}.{part}") in names]
        if attribute not in QUANTIZED_PARTS or len(part_names) == 1:
            yield name, [name]
        elif attribute == QUANTIZED_PARTS[0]:
            yield name, part_names


def _find_sources(name: str, key_map: KeyMap) -> tuple[TensorSource, ...]:
    """Return the sources of a parameter; of a part of a `GgufLinear` the one that it holds."""
    stem, _, index = name.rpartition(PART_NAME)
    if not index.isdigit():
        return key_map.find_sources(name)
    return (key_map.find_sources(f"{stem}weight")[int(index)],)


def _fill_rows(
    local_parts: Sequence[Tensor],
    first_row: int,
    num_rows: int,
    files: TensorFiles,
    sources: tuple[TensorSource, ...],
    device: torch.device,
) -> None:
    """Fill a parameter of ``num_rows`` rows, or a quantised linear's parts, from row ``first_row`` on."""
    for target_rows, source, stored_start in _list_row_ranges(
        first_row, len(local_parts[0]), num_rows, sources
    ):
        source_parts = [part[target_rows] for part in local_parts]
        if len(source_parts) == 1 and source_parts[0].dtype == torch.uint8:
            _copy_stored_rows(source_parts[0], stored_start, files, source.key)  # GGUF's blocks
            continue
        if source.update is not None:
            source = replace(source, update=source.update.hold(device))
        if len(source_parts) == 1:
            _copy_rows(source_parts[0], stored_start, files, source, device)
        else:
            _quantize_rows(source_parts, stored_start, files, source, device)


def _quantize_rows(
    parts: Sequence[Tensor],
    stored_start: int,
    files: TensorFiles,
    source: TensorSource,
    device: torch.device,
) -> None:
    """Fill rows of a quantised linear's parts from those of ``source`` from ``stored_start`` on."""
    weight, scales, *_ = parts
    kind = find_quantization(weight.dtype)
    if kind == "fp8" and files.is_fp8(source.key) and source.update is None:
        _copy_fp8_rows(weight, scales, stored_start, files, source)
        return
    num_columns = weight.shape[1] * (2 if kind == "int4" else 1)
    num_at_once = _count_rows_at_once(num_columns)
    for start in range(0, len(weight), num_at_once):
        rows = torch.empty(min(num_at_once, len(weight) - start), num_columns, device=device)
        _copy_rows(rows, stored_start + start, files, source, device)
        for part, values in zip(parts, quantize_rows(rows, kind).values(), strict=True):
            part[start : start + len(rows)].copy_(values)


def _count_rows_at_once(num_columns: int) -> int:
    return max(1, READ_VALUES // num_columns)


def _copy_fp8_rows(
    weight: Tensor, scales: Tensor, stored_start: int, files: TensorFiles, source: TensorSource
) -> None:
    """Copy the files' 8-bit weights unchanged, and their scales, which are 1 where the files have none."""
    _copy_stored_rows(weight, stored_start, files, source.key)
    scale = files.read_scale(source.key, stored_start, stored_start + len(weight))
    scales[:] = 1.0 if scale is None else scale.to(scales.device)


def _copy_stored_rows(target: Tensor, stored_start: int, files: TensorFiles, key: str) -> None:
    """Copy rows of one byte a column as they are stored."""
    num_at_once = _count_rows_at_once(target.shape[1])
    for start in range(0, len(target), num_at_once):
        target_rows = target[start : start + num_at_once]
        first_row = stored_start + start
        stored_rows = files.read_rows(key, first_row, first_row + len(target_rows))
        target_rows.copy_(copy_to_device(stored_rows, target.device))
        files.release_pages(stored_rows)


def _copy_rows(
    target: Tensor,
    stored_start: int,
    files: TensorFiles,
    source: TensorSource,
    device: torch.device,
) -> None:
    """Copy the rows of ``source`` from ``stored_start`` on into ``target``.

    Stored values are decoded, and what LoRAs add to them is computed, on ``device``, some rows at a time.
    """
    is_encoded, update = files.is_encoded(source.key), source.update
    num_at_once = len(target)
    if is_encoded or target.is_cuda:
        num_at_once = _count_rows_at_once(prod(target.shape[1:]))
    if update is not None:
        num_at_once = count_merged_rows(prod(target.shape[1:]))

    def read_values(start: int, stop: int) -> Tensor:
        is_computed = is_encoded or update is not None
        return _read_values(
            files,
            source.key,
            slice(start, stop),
            target.shape[1:],
            device if is_computed else target.device,
        )

    def read_floats(start: int, stop: int) -> Tensor:
        values = read_values(start, stop)
        floats = values.float()
        if not is_encoded:
            files.release_pages(values)
        return floats

    for start in range(0, len(target), num_at_once):
        target_rows = target[start : start + num_at_once]
        first_row, end_row = stored_start + start, stored_start + start + len(target_rows)
        if update is not None:
            target_rows.copy_(update.merge_rows(read_floats, first_row, end_row))
            continue
        values = read_values(first_row, end_row)
        # The dtype is converted on the device: one pass, no copy on the host.
        target_rows.copy_(values)
        if not is_encoded:
            files.release_pages(values)
        del values  # before the next one is read


def _read_values(
    files: TensorFiles, key: str, rows: slice, row_shape: Shape, device: torch.device
) -> Tensor:
    """Return rows of a stored tensor, whose shape may differ as `check_keys` allows."""
    num_stored_dims = len(files.shapes[key])
    if num_stored_dims == len(row_shape) + 1:
        return files.read_values(key, rows.start, rows.stop, device)
    if num_stored_dims == 2 and len(row_shape) == 4:  # a convolution as a linear
        return files.read_values(key, rows.start, rows.stop, device).view(-1, *row_shape)
    values = files.read_values(key, 0, files.shapes[key][0], device)
    return values.reshape(-1, *row_shape)[rows]


def _list_row_ranges(
    first_row: int, num_target_rows: int, num_rows: int, sources: tuple[TensorSource, ...]
) -> Iterator[tuple[slice, TensorSource, int]]:
    """Yield the target's rows that each source has, the source, and the first row in what is stored.

    The target is rows of a parameter from ``first_row`` on, which has ``num_rows`` in all.
    """
    rows_per_source = num_rows // len(sources)
    for index, source in enumerate(sources):
        start = max(first_row, index * rows_per_source)
        stop = min(first_row + num_target_rows, (index + 1) * rows_per_source)
        if start < stop:
            # Within the stored tensor, of which the source may be one part.
            offset = (source.part_index - index) * rows_per_source
            target_rows = slice(start - first_row, stop - first_row)
            yield target_rows, source, start + offset
