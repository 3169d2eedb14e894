"""Checkpoint layouts: which files of a folder hold which model, in either published layout.

Original: files at the top, transformers of two experts in folders of their own. Diffusers: a folder for each
model. Which layout a folder has is decided by the files in it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import (
    UnreadableFileError,
    check_regular_file,
    read_checkpoint_json,
)
from wan_dist.tasks.base import Task
from wan_dist.weights import key_maps
from wan_dist.weights.files import TensorFiles, open_sharded_weights
from wan_dist.weights.key_maps import KeyMap

WEIGHTS_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of files of weights, in upper or lower case; the content, not the suffix, tells the format."""


@dataclass(frozen=True)
class ComponentFiles:
    """One model of a checkpoint: its files and their key map."""

    folder: Path
    file_or_stem: str
    """A file's name, or the stem of sharded ``.safetensors``; absolute: a file of any name."""
    build_key_map: Callable[[Collection[str]], KeyMap]
    config_file: str | None = None

    def open(self) -> tuple[dict[str, Any], TensorFiles, KeyMap]:
        """Return config, files and key map; headers are read, weights are not.

        Raises InputError for missing or damaged files.
        """
        config: dict[str, Any] = {}
        if self.config_file is not None:
            config = read_checkpoint_json(self.folder / self.config_file)
        path = Path(self.file_or_stem)
        is_file = path.is_absolute() or path.suffix.lower() in WEIGHT_SUFFIXES
        files = (
            TensorFiles([self.folder / path])
            if is_file
            else open_sharded_weights(self.folder, self.file_or_stem)
        )
        return config, files, self.build_key_map(files.shapes)


@dataclass(frozen=True)
class CheckpointLayout:
    """Files of a task's models. ``transformers``: one, or those for high and low noise, in this order."""

    name: str
    transformers: tuple[ComponentFiles, ...]
    text_encoder: ComponentFiles
    image_encoder: ComponentFiles | None
    vae: ComponentFiles
    tokenizer_folder: Path


def get_vae_file_name(task: Task) -> str:
    """Return the name of the task's VAE file in the original layout."""
    return "Wan2.2_VAE.pth" if task.latent_channels == 48 else "Wan2.1_VAE.pth"


def list_download_patterns(task: Task) -> list[str]:
    """Return glob patterns of all files that a run reads from the task's repository, and no others.

    Published repositories are in the original layout.
    """
    folders = ("high_noise_model/", "low_noise_model/") if task.expert_boundary else ("",)
    patterns = [
        f"{folder}{name}"
        for folder in folders
        for name in ("config.json", f"{WEIGHTS_STEM}*.safetensors*")
    ]
    patterns += [TEXT_ENCODER_FILE, get_vae_file_name(task), f"{TOKENIZER_FOLDER}/*"]
    return [*patterns, IMAGE_ENCODER_FILE] if task.has_image_encoder else patterns


def find_layout(
    folder: Path, task: Task, transformer_files: Sequence[Path] = ()
) -> CheckpointLayout:
    """Return the layout of a folder; raises InputError, with the files missing and found, if incomplete."""
    if not folder.is_dir():
        raise InputError(f"ckpt_dir={folder} is not a folder")
    is_diffusers = (folder / "model_index.json").exists() or (folder / "transformer").is_dir()
    layout = (
        _build_diffusers_layout(folder, task)
        if is_diffusers
        else _build_original_layout(folder, task)
    )
    if transformer_files:
        layout = replace(
            layout, transformers=_replace_weight_files(layout.transformers, transformer_files)
        )
    components = (*layout.transformers, layout.text_encoder, layout.image_encoder, layout.vae)
    missing_files = [
        str(path.relative_to(folder))
        for component in components
        if component is not None and (path := _find_missing_file(component)) is not None
    ]
    if not layout.tokenizer_folder.is_dir():
        missing_files.append(str(layout.tokenizer_folder.relative_to(folder)))
    if missing_files:
        present_files = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise InputError(
            f"{folder} is not a whole {task.name} checkpoint in the {layout.name} layout: "
            f"it has no {', '.join(missing_files)} (found: {present_files})"
        )
    return layout


def _build_original_layout(folder: Path, task: Task) -> CheckpointLayout:
    subfolders = ("high_noise_model", "low_noise_model") if task.expert_boundary else (".",)
    image_encoder = None
    if task.has_image_encoder:
        image_encoder = ComponentFiles(
            folder,
            _find_weights_file(folder, IMAGE_ENCODER_FILE),
            key_maps.map_original_image_encoder,
        )
    return CheckpointLayout(
        name="original",
        transformers=tuple(
            ComponentFiles(
                folder / subfolder, WEIGHTS_STEM, key_maps.map_original_transformer, "config.json"
            )
            for subfolder in subfolders
        ),
        text_encoder=ComponentFiles(
            folder,
            _find_weights_file(folder, TEXT_ENCODER_FILE),
            key_maps.map_original_text_encoder,
        ),
        image_encoder=image_encoder,
        vae=ComponentFiles(
            folder, _find_weights_file(folder, get_vae_file_name(task)), key_maps.map_original_vae
        ),
        tokenizer_folder=folder / TOKENIZER_FOLDER,
    )


def _find_weights_file(folder: Path, file_name: str) -> str:
    """Return a published file's name, or if it is missing, that of a file with another suffix of weights."""
    if (folder / file_name).is_file():
        return file_name
    stem = Path(file_name).stem.casefold()
    candidates = [
        path.name
        for path in folder.iterdir()
        if path.stem.casefold() == stem and path.suffix.lower() in WEIGHT_SUFFIXES
    ]
    return min(
        candidates,
        default=file_name,
        key=lambda name: (WEIGHT_SUFFIXES.index(Path(name).suffix.lower()), name),
    )


def _build_diffusers_layout(folder: Path, task: Task) -> CheckpointLayout:
    subfolders = ("transformer", "transformer_2") if task.expert_boundary else ("transformer",)
    image_encoder = ComponentFiles(
        folder / "image_encoder", "model", key_maps.map_diffusers_image_encoder, "config.json"
    )
    return CheckpointLayout(
        name="Diffusers",
        transformers=tuple(
            ComponentFiles(
                folder / subfolder, WEIGHTS_STEM, key_maps.map_diffusers_transformer, "config.json"
            )
            for subfolder in subfolders
        ),
        text_encoder=ComponentFiles(
            folder / "text_encoder", "model", key_maps.map_diffusers_text_encoder, "config.json"
        ),
        image_encoder=image_encoder if task.has_image_encoder else None,
        vae=ComponentFiles(folder / "vae", WEIGHTS_STEM, key_maps.map_diffusers_vae, "config.json"),
        tokenizer_folder=folder / "tokenizer",
    )


def _find_missing_file(component: ComponentFiles) -> Path | None:
    """Return the first missing file of a model, as a pattern where it may be sharded."""
    folder, file_or_stem = component.folder, component.file_or_stem
    if component.config_file is not None and not (folder / component.config_file).exists():
        return folder / component.config_file
    if Path(file_or_stem).is_absolute() or any(folder.glob(f"{file_or_stem}*")):
        return None
    is_file = file_or_stem.endswith(".pth")
    return folder / (file_or_stem if is_file else f"{file_or_stem}*.safetensors")


def _replace_weight_files(
    transformers: tuple[ComponentFiles, ...], paths: Sequence[Path]
) -> tuple[ComponentFiles, ...]:
    """Return the transformers with their weights in these files, one each."""
    if len(paths) != len(transformers):
        expected = "two, those for HIGH,LOW noise" if len(transformers) == 2 else "one"
        raise InputError(f"dit_file: this task takes {expected}, not {len(paths)} files")
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"dit_file={path} is a folder; give the file in it, "
                "or ckpt_dir=FOLDER for a whole checkpoint"
            )
        try:
            check_regular_file(path)
        except UnreadableFileError as error:
            raise InputError(f"dit_file={path} cannot be read: {error}") from None
    pairs = zip(transformers, paths, strict=True)
    return tuple(
        replace(
            component,
            file_or_stem=str(path.absolute()),
            build_key_map=key_maps.map_single_file_transformer,
        )
        for component, path in pairs
    )
