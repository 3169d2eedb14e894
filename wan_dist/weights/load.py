"""Fill a model that was built on the meta device from checkpoint files, strictly and one tensor at a time."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from wan_dist.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles, first_ten
from wan_dist.weights.names import KeyMap, Source


def check_keys(models: Sequence[nn.Module], files: TensorFiles, keys: KeyMap) -> None:
    """Raise one InputError that names every kind of mismatch between the models' parameters and the files' tensors.

    Shapes only: nothing is read.
    """
    wanted: set[str] = set()
    missing, misshapen = [], []
    for name, parameter in chain.from_iterable(model.named_parameters() for model in models):
        sources = keys.sources(name)
        for source in sources:
            wanted.add(source.key)
            expected = (parameter.shape[0] // len(sources) * source.parts, *parameter.shape[1:])
            if source.key not in files.shapes:
                missing.append(source.key)
            elif not _fits(files.shapes[source.key], expected):
                misshapen.append(f"{source.key} {files.shapes[source.key]}, not {expected}")
    unexpected = [key for key in files.shapes if key not in wanted and not keys.ignores(key)]
    faults = [
        f"{len(items)} {kind}: {first_ten(items)}"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
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
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if is_sharded:
        model.to_empty(device=device)
    for name, parameter in list(model.named_parameters()):
        if name.startswith(leave):
            continue
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
            _copy_rows(parameter.to_local(), offset[0], parameter.shape[0], files, keys.sources(name))
            continue
        filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        _copy_rows(filled, 0, parameter.shape[0], files, keys.sources(name))
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))
    return model.eval().requires_grad_(False)


def read_parameters(targets: Mapping[str, Tensor], files: TensorFiles, keys: KeyMap) -> None:
    """Read the files' values into these parameters, by their names in the model."""
    for name, target in targets.items():
        _copy_rows(target, 0, target.shape[0], files, keys.sources(name))


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
        target[start - offset : stop - offset].copy_(stored.to(target.device))
        files.forget(stored)
        del stored  # before the next one is read
