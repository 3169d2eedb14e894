"""Fill a model that was built on the meta device from checkpoint files, strictly and one tensor at a time."""

import torch
from torch import nn

from wan_dist.errors import InputError
from wan_dist.weights.files import Shape, TensorFiles, first_ten
from wan_dist.weights.names import KeyMap


def check_keys(model: nn.Module, files: TensorFiles, keys: KeyMap) -> None:
    """Raise one InputError that names every kind of mismatch between the model's parameters and the files' tensors.

    Shapes only: nothing is read.
    """
    wanted: set[str] = set()
    missing, misshapen = [], []
    for name, parameter in model.named_parameters():
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
        raise InputError(f"{files} does not hold the tensors of a {type(model).__name__}; {'; '.join(faults)}")


def _fits(stored: Shape, expected: Shape) -> bool:
    """Whether the shapes are equal but for dims of length 1 in front, which some checkpoints have."""
    extra = len(stored) - len(expected)
    return extra >= 0 and stored[extra:] == expected and set(stored[:extra]) <= {1}


@torch.no_grad()
def fill(model: nn.Module, files: TensorFiles, keys: KeyMap, device: torch.device) -> nn.Module:
    """Replace the model's meta parameters by the files' tensors, in each parameter's own dtype, on ``device``.

    Holds at most the model and one tensor of the files. `check_keys` must have passed.
    """
    for name, parameter in list(model.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        sources = keys.sources(name)
        for target, source in zip(filled.chunk(len(sources)), sources, strict=True):
            stored = files.read(source.key).to(device)  # the dtype is converted on the device: one pass, no copy on the host
            target.copy_(stored.reshape(-1, *target.shape[1:]).chunk(source.parts)[source.part].view(target.shape))
            del stored
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))
    return model.eval().requires_grad_(False)
