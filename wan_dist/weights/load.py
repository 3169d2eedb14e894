"""Fill a model that was built on the meta device from checkpoint files, strictly and one tensor at a time."""

import torch
from torch import nn

from wan_dist.errors import InputError
from wan_dist.weights.files import TensorFiles, first_ten
from wan_dist.weights.names import KeyMap


def check_keys(model: nn.Module, files: TensorFiles, keys: KeyMap) -> None:
    """Raise one InputError that names every kind of mismatch between the model's parameters and the files' tensors.

    Shapes only: nothing is read.
    """
    wanted: set[str] = set()
    missing, misshapen = [], []
    for name, parameter in model.named_parameters():
        parts = keys(name)
        wanted.update(parts)
        expected = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        for part in parts:
            if part not in files.shapes:
                missing.append(part)
            elif files.shapes[part] != expected:
                misshapen.append(f"{part} {files.shapes[part]}, not {expected}")
    unexpected = [name for name in files.shapes if name not in wanted]
    faults = [
        f"{len(items)} {kind}: {first_ten(items)}"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
        if items
    ]
    if faults:
        raise InputError(f"{files} does not hold the tensors of a {type(model).__name__}; {'; '.join(faults)}")


@torch.no_grad()
def fill(model: nn.Module, files: TensorFiles, keys: KeyMap, device: torch.device) -> nn.Module:
    """Replace the model's meta parameters by the files' tensors, in each parameter's own dtype, on ``device``.

    Holds at most the model and one tensor of the files. `check_keys` must have passed.
    """
    for name, parameter in list(model.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parts = keys(name)
        for target, part in zip(filled.chunk(len(parts)), parts, strict=True):
            target.copy_(files.read(part).to(device))  # the dtype is converted on the device: one pass, no copy on the host
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=False))
    return model.eval().requires_grad_(False)
