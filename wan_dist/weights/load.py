"""Fill a model that was built on the meta device from checkpoint files, strictly and one tensor at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from wan_dist.models.kernels.quantized_linear import PARTS as QUANTIZED_PARTS
from wan_dist.models.kernels.quantized_linear import kind_of, quantize
from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles, first_ten
from wan_dist.weights.key_maps import KeyMap, Source

_ROWS_AT_ONCE = 512


def check_keys(models: Sequence[nn.Module], files: TensorFiles, keys: KeyMap) -> None:
    """Raise one InputError that names every kind of mismatch between the models' parameters and the files' tensors.

    Shapes only: nothing is read.
    """
    wanted: set[str] = set()
    missing, misshapen, mistyped = [], [], []
    for name, parameter in chain.from_iterable(model.named_parameters() for model in models):
        sources = keys.sources(name)
        for source in sources:
            wanted.add(source.key)
            expected = (parameter.shape[0] // len(sources) * source.parts, *parameter.shape[1:])
            if source.key not in files.shapes:
                missing.append(source.key)
            elif not _fits(files.shapes[source.key], expected):
                misshapen.append(f"{source.key} {files.shapes[source.key]}, not {expected}")
            elif source.key in files.not_floats:
                mistyped.append(f"{source.key} ({files.not_floats[source.key]})")
    unexpected = [key for key in files.shapes if key not in wanted and not keys.ignores(key)]
    faults = [
        f"{len(items)} {kind}: {first_ten(items)}"
        for kind, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
            ("of numbers that are no floats", mistyped),
        )
        if items
    ]
    if faults:
        raise InputError(f"{files} does not hold the tensors of a {type(models[0]).__name__}; {'; '.join(faults)}")


def _fits(stored: Shape, expected: Shape) -> bool:
    """Whether the shapes are equal but for dims of length 1 in front, which some checkpoints have."""
    extra = len(stored) - len(expected)
    return extra >= 0 and stored[extra:] == expected and set(stored[:extra]) <= {1}


@torch.no_grad()
def fill(model: nn.Module, files: TensorFiles, keys: KeyMap, device: torch.device, *, leave: tuple[str, ...] = ()) -> nn.Module:
    """Give the model's meta parameters the files' values, in each parameter's own dtype, on ``device``.

    Parameters whose names begin with one of ``leave`` are left alone. Of a sharded parameter only this rank's rows are read. Holds at
    most the model and one tensor of the files. `check_keys` must have passed.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        model.to_empty(device=device)
    parameters = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(leave)}
    for name, targets in _groups(parameters):
        parts = {key: parameters[key] for key in targets}
        local = {
            key: part.to_local() if isinstance(part, DTensor) else torch.empty_like(part, device=device) for key, part in parts.items()
        }
        whole, first = parameters[name], 0
        if isinstance(whole, DTensor):
            _, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
            first = offset[0]
        _fill_rows(list(local.values()), first, whole.shape[0], files, keys.sources(name), device)
        for key, part in parts.items():
            if not isinstance(part, DTensor):
                owner, _, attribute = key.rpartition(".")
                setattr(model.get_submodule(owner), attribute, nn.Parameter(local[key], requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))
    return model.eval().requires_grad_(False)


def read_parameters(targets: Mapping[str, Tensor], files: TensorFiles, keys: KeyMap, device: torch.device) -> None:
    """Read the files' values into these parameters, by their names in the model; quantised ones are computed on ``device``."""
    for name, parts in _groups(targets):
        _fill_rows([targets[key] for key in parts], 0, targets[name].shape[0], files, keys.sources(name), device)


def _groups(names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of what the files hold, each with the parameters made of it: itself, and of a quantised weight its scales."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        parts = [key for part in QUANTIZED_PARTS if (key := f"{owner}.{part}") in names]
        if attribute not in QUANTIZED_PARTS or len(parts) == 1:
            yield name, [name]
        elif attribute == QUANTIZED_PARTS[0]:
            yield name, parts


def _fill_rows(
    local: Sequence[Tensor], first: int, num_rows: int, files: TensorFiles, sources: tuple[Source, ...], device: torch.device
) -> None:
    """Fill rows ``first`` and on of a parameter of ``num_rows``, or of a quantised linear's parts."""
    target, *scales = local
    if not scales:
        _copy_rows(target, first, num_rows, files, sources)
        return
    kind = kind_of(target.dtype)
    if kind == "fp8" and all(files.is_fp8(source.key) for source in sources):
        _copy_fp8_rows(target, scales[0], first, num_rows, files, sources)
        return
    num_columns = target.shape[1] * (2 if kind == "int4" else 1)
    for start in range(0, len(target), _ROWS_AT_ONCE):
        rows = torch.empty(min(_ROWS_AT_ONCE, len(target) - start), num_columns, device=device)
        _copy_rows(rows, first + start, num_rows, files, sources)
        for part, values in zip(local, quantize(rows, kind).values(), strict=True):
            part[start : start + len(rows)].copy_(values)


def _copy_fp8_rows(weight: Tensor, scales: Tensor, offset: int, num_rows: int, files: TensorFiles, sources: tuple[Source, ...]) -> None:
    """Take over 8-bit weights as they are in the files, and their scales."""
    each = num_rows // len(sources)
    for index, source in enumerate(sources):
        start, stop = max(offset, index * each), min(offset + len(weight), (index + 1) * each)
        if start >= stop:
            continue
        rows = slice(start - offset, stop - offset)
        first = start - index * each
        stored = files.read_rows(source.key, first, first + stop - start)
        weight[rows].copy_(stored)
        scale = files.scale_of(source.key, first, first + stop - start)
        scales[rows] = 1.0 if scale is None else scale.to(scales.device)
        files.forget(stored)


def _copy_rows(target: Tensor, offset: int, num_rows: int, files: TensorFiles, sources: tuple[Source, ...]) -> None:
    """Copy rows ``offset`` and on of a parameter, which has ``num_rows`` and consists of ``sources``, into ``target``."""
    each = num_rows // len(sources)
    for index, source in enumerate(sources):
        start, stop = max(offset, index * each), min(offset + len(target), (index + 1) * each)
        if start >= stop:
            continue
        first = start - index * each + source.part * each  # within the stored tensor
        if len(files.shapes[source.key]) == target.dim():
            stored = files.read_rows(source.key, first, first + stop - start)
        else:
            stored = files.read(source.key).reshape(-1, *target.shape[1:])[first : first + stop - start]
        # The dtype is converted on the device: one pass, no copy on the host.
        rows = stored.to(target.device)
        if (scale := files.scale_of(source.key, first, first + stop - start)) is not None:
            rows = rows.float() * scale.to(target.device)
        target[start - offset : stop - offset].copy_(rows)
        files.forget(stored)
        del stored, rows  # before the next one is read
