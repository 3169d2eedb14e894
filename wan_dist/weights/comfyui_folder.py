"""ComfyUI's ``models`` folder: files of any names, in a folder for each kind of model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task
from wan_dist.weights import checkpoint_dims, key_maps
from wan_dist.weights.file_kinds import check_kind, find_kind
from wan_dist.weights.files import TensorFiles, format_first_ten

_FOLDERS = {
    "dit_file": ("diffusion_models", "unet"),
    "t5_file": ("text_encoders", "clip"),
    "vae_file": ("vae",),
    "clip_file": ("clip_vision",),
}
"""Folders by the setting that names a file in them; the second is the older name."""
_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt", ".gguf")


def is_comfyui_folder(folder: Path) -> bool:
    """Whether a folder has ComfyUI's folders rather than a checkpoint's."""
    if any((folder / name).exists() for name in ("model_index.json", "transformer", "config.json")):
        return False
    return any((folder / name).is_dir() for name in _FOLDERS["dit_file"])


def find_files(
    folder: Path, task: Task, given_files: Mapping[str, Sequence[Path]]
) -> dict[str, Sequence[Path]]:
    """Return the files of a task's models: the given ones, and those of the folder for the others.

    Raises InputError where the folder has none of a kind that suits the task, or several. Headers are read.
    """
    files = dict(given_files)
    for setting in _FOLDERS:
        if setting not in files and (setting != "clip_file" or task.has_image_encoder):
            files[setting] = _choose_files(folder, setting, task)
    return files


def _choose_files(folder: Path, setting: str, task: Task) -> list[Path]:
    subfolders = [folder / name for name in _FOLDERS[setting]]
    paths = sorted(
        path
        for subfolder in subfolders
        for path in subfolder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    problems: dict[Path, str] = {}
    suitable_paths = []
    for path in paths:
        if (problem := _find_problem(path, setting, task)) is None:
            suitable_paths.append(path)
        else:
            problems[path] = problem
    suitable_paths = _prefer_published_width(suitable_paths, setting, task)
    needs_two = setting == "dit_file" and task.expert_boundary is not None
    if len(suitable_paths) == 1 and not needs_two:
        return suitable_paths
    names = " or ".join(f"{subfolder}/" for subfolder in subfolders)
    if not suitable_paths:
        reasons = [f"{path.name}: {problem}" for path, problem in problems.items()]
        raise InputError(
            f"ckpt_dir={folder} is a ComfyUI folder, and {names} has no file for {task.name} "
            f"({format_first_ten(reasons) or 'it is empty'}); {setting}=FILE names one elsewhere"
        )
    found = format_first_ten([str(path.relative_to(folder)) for path in suitable_paths])
    reason = (
        "no tensor tells which expert is for high and which for low noise"
        if needs_two
        else "several are of the kind"
    )
    choice = "HIGH,LOW" if needs_two else "FILE"
    raise InputError(
        f"ckpt_dir={folder} is a ComfyUI folder: {reason} ({found}); choose with {setting}={choice}"
    )


def _find_problem(path: Path, setting: str, task: Task) -> str | None:
    """Return why a file is not the one that the task needs, None for one that is."""
    try:
        files = TensorFiles([path], setting=setting)
        kind = find_kind(files.shapes)
        if kind is None or kind.setting != setting:
            return "of an unknown kind" if kind is None else kind.description
        check_kind(files, setting)
        return _find_mismatch(files, setting, task)
    except InputError as error:
        return str(error).removeprefix(f"{setting}=").removeprefix(f"{path}").strip(": ")


def _find_mismatch(files: TensorFiles, setting: str, task: Task) -> str | None:
    """Return how a model differs from that of the task, None if it does not."""
    if setting == "vae_file":
        vae = checkpoint_dims.infer_vae_dims({}, files, key_maps.map_single_file_vae(files.shapes))
        if vae.latent_dim != task.latent_channels:
            return f"{vae.latent_dim} latent channels, not {task.latent_channels}"
    if setting == "dit_file":
        inputs = _infer_transformer_inputs(files)
        expected = task.transformer_dims
        expected_inputs = (expected.in_dim, expected.image_dim > 0, expected.vace_in_dim)
        if inputs[1:4] != expected_inputs:
            branch = " and an image branch" if inputs.has_images else ""
            branch += " and VACE's side branch" if inputs.num_vace_channels else ""
            return f"{inputs.num_channels} input channels{branch}"
        if inputs.has_camera != (expected.camera_in_dim > 0):
            return f"it has {'a' if inputs.has_camera else 'no'} camera adapter"
        if inputs.has_poses != (expected.pose_dim > 0):
            return f"it takes {'' if inputs.has_poses else 'no '}poses"
    return None


def _infer_transformer_inputs(files: TensorFiles) -> checkpoint_dims.TransformerInputs:
    return checkpoint_dims.infer_transformer_inputs(
        files, key_maps.map_single_file_transformer(files.shapes)
    )


def _prefer_published_width(paths: list[Path], setting: str, task: Task) -> list[Path]:
    """Return the transformers of the size that the task was published in, all if there are none."""
    if setting != "dit_file" or len(paths) < 2:
        return paths
    published_paths = [
        path
        for path in paths
        if _infer_transformer_inputs(TensorFiles([path], setting=setting)).dim
        == task.transformer_dims.dim
    ]
    return published_paths or paths
