"""Latents that an earlier run kept: what their file says of them; no torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableError, check_file
from wan_dist.tasks.registry import Task

LONGEST_SIDE = 16384
"""Pixels of a video; H.264 encoders take no more."""
_DTYPES = ("F64", "F32", "F16", "BF16")


def size_of_latents(file: str, task: Task) -> tuple[int, int, int]:
    """Return width, height and frames of the video that kept latents hold."""
    path = Path(file).expanduser()
    try:
        check_file(path)
        with safe_open(path, framework="numpy") as tensors:
            names, metadata = list(tensors.keys()), tensors.metadata() or {}
            stored = tensors.get_slice("latents") if "latents" in names else None
            shape, dtype = (stored.get_shape(), stored.get_dtype()) if stored is not None else ([], "")
    except (UnreadableError, OSError, SafetensorError) as fault:
        raise InputError(f"latents={file} cannot be read as kept latents: {fault}") from None
    if stored is None:
        raise InputError(f"latents={file} holds no tensor called latents (but {', '.join(names[:5]) or 'none'}); kept latents do")
    if "num_done" in metadata:
        raise InputError(
            f"latents={file} is the progress of a run after {metadata['num_done']} steps; the command that began it resumes it"
        )
    if dtype not in _DTYPES:
        raise InputError(f"latents={file} holds numbers of type {dtype}; {', '.join(_DTYPES)} work")
    if len(shape) != 4 or shape[0] != task.latent_channels or 0 in shape:
        raise InputError(f"latents={file} has shape {tuple(shape)}; {task.name} needs ({task.latent_channels}, T, h, w)")
    if shape[2] % task.patch[1] or shape[3] % task.patch[2]:
        raise InputError(f"latents={file} has shape {tuple(shape)}; h and w must be multiples of {task.patch[1]} and {task.patch[2]}")
    if max(shape[2] * task.stride[1], shape[3] * task.stride[2]) > LONGEST_SIDE:
        raise InputError(f"latents={file} has shape {tuple(shape)}; videos have {LONGEST_SIDE} pixels a side at most")
    return shape[3] * task.stride[2], shape[2] * task.stride[1], (shape[1] - 1) * task.stride[0] + 1
