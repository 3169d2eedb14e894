"""Saved latents of an earlier run: read the video size from the file's header; no torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file
from wan_dist.tasks.base import Task

MAX_VIDEO_SIDE = 16384
"""Pixels of a video; H.264 encoders take no more."""
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def read_latents_size(file: str, task: Task) -> tuple[int, int, int]:
    """Return width and height in pixels and the number of frames of the video of saved latents.

    Raises InputError for a file that cannot be read or holds no latents of ``task``.
    """
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
        with safe_open(path, framework="numpy") as opened_file:
            tensor_names, metadata = list(opened_file.keys()), opened_file.metadata() or {}
            latents_slice = opened_file.get_slice("latents") if "latents" in tensor_names else None
            shape, dtype = (
                (latents_slice.get_shape(), latents_slice.get_dtype())
                if latents_slice is not None
                else ([], "")
            )
    except (UnreadableFileError, OSError, SafetensorError) as error:
        raise InputError(f"latents={file} cannot be read as saved latents: {error}") from None
    if latents_slice is None:
        raise InputError(
            f"latents={file} has no tensor named latents "
            f"(found: {', '.join(tensor_names[:5]) or 'none'}); give a file NAME.latents.safetensors of a run"
        )
    if "num_done" in metadata:
        raise InputError(
            f"latents={file} is the saved progress of a run after {metadata['num_done']} steps; "
            "give the command that started the run again, which resumes it"
        )
    if dtype not in _FLOAT_DTYPES:
        raise InputError(
            f"latents={file} has dtype {dtype}; supported are {', '.join(_FLOAT_DTYPES)}"
        )
    if len(shape) != 4 or shape[0] != task.latent_channels or 0 in shape:
        raise InputError(
            f"latents={file} has shape {tuple(shape)}; {task.name} needs ({task.latent_channels}, T, h, w)"
        )
    if shape[2] % task.patch_size[1] or shape[3] % task.patch_size[2]:
        raise InputError(
            f"latents={file} has shape {tuple(shape)}; "
            f"h and w must be multiples of {task.patch_size[1]} and {task.patch_size[2]}"
        )
    if max(shape[2] * task.vae_stride[1], shape[3] * task.vae_stride[2]) > MAX_VIDEO_SIDE:
        raise InputError(
            f"latents={file} has shape {tuple(shape)}; the limit is {MAX_VIDEO_SIDE} pixels a side"
        )
    return (
        shape[3] * task.vae_stride[2],
        shape[2] * task.vae_stride[1],
        (shape[1] - 1) * task.vae_stride[0] + 1,
    )
