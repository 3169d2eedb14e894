"""Checkpoint layouts: which files of a folder hold which model, in either published layout.

Original: files at the top, transformers of two experts in folders of their own. Diffusers: a folder for each
model. Which layout a folder has is decided by the files in it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import (
    UnreadableFileError,
    check_regular_file,
    read_checkpoint_json,
)
from wan_dist.tasks.base import Task
from wan_dist.weights import comfyui_folder, key_maps
from wan_dist.weights.audio_keys import map_audio_encoder
from wan_dist.weights.file_kinds import check_kind
from wan_dist.weights.files import TensorFiles, open_sharded_weights
from wan_dist.weights.key_maps import KeyMap

WEIGHTS_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
AUDIO_ENCODER_FOLDER = "wav2vec2-large-xlsr-53-english"
ANIMATE_2_FOLDER, ANIMATE_2_FILE = "wan_animate_2", "wan_animate_2_bf16.safetensors"
ANIMATE_2_MODELS, ANIMATE_2_VAE = "videomodel/Wan-AI", "vae.pth"
"""Folders and files of the release of Animate-2, whose other models are in a folder of their own."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
"""Suffixes of files of weights, in upper or lower case; the format is detected by content, not by suffix."""


GivenFiles = Mapping[str, Sequence[Path]]
"""Files of weights that are used instead of a folder's, by the settings that name them."""
NO_FILES: GivenFiles = MappingProxyType({})
_SINGLE_FILE_MAPS = {
    "dit_file": key_maps.map_single_file_transformer,
    "t5_file": key_maps.map_single_file_text_encoder,
    "vae_file": key_maps.map_single_file_vae,
    "clip_file": key_maps.map_single_file_image_encoder,
}


def list_file_settings(task: Task) -> list[str]:
    """Return the settings that name files of the task's models."""
    return [
        setting for setting in _SINGLE_FILE_MAPS if setting != "clip_file" or task.has_image_encoder
    ]


@dataclass(frozen=True)
class ComponentFiles:
    """One model of a checkpoint: its files and their key map."""

    folder: Path
    file_or_stem: str
    """A file's name, or the stem of sharded ``.safetensors``; with ``setting`` a path."""
    build_key_map: Callable[[Collection[str]], KeyMap]
    config_file: str | None = None
    setting: str | None = None
    """The setting that names the file; None: it is a published one, in its place in a folder."""

    def open(self) -> tuple[dict[str, Any], TensorFiles, KeyMap]:
        """Return config, files and key map; headers are read, weights are not.

        Raises InputError for missing or damaged files, for a file of another kind than the setting takes, and
        for models that their config says are quantised.
        """
        if self.setting is not None:
            files = TensorFiles([Path(self.file_or_stem)], setting=self.setting)
            check_kind(files, self.setting)
            return {}, files, self.build_key_map(files.shapes)
        config: dict[str, Any] = {}
        if self.config_file is not None:
            config = read_checkpoint_json(self.folder / self.config_file)
            _check_not_quantized(config, self.folder / self.config_file)
        path = Path(self.file_or_stem)
        is_file = path.suffix.lower() in WEIGHT_SUFFIXES
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
    audio_encoder: ComponentFiles | None = None
    tokenizer_folder: Path | None = None
    """None: the tokenizer is looked for in the text encoder's file and in the Hugging Face cache."""
    transformer_configs: tuple[Path, ...] = ()
    """Configs that may give what the tensors of a transformer named by a setting do not show."""


def get_vae_file_name(task: Task) -> str:
    """Return the name of the task's VAE file in the original layout."""
    return "Wan2.2_VAE.pth" if task.latent_channels == 48 else "Wan2.1_VAE.pth"


def find_layout(
    folder: Path | None, task: Task, given_files: GivenFiles = NO_FILES
) -> CheckpointLayout:
    """Return the files of a checkpoint: those of a folder, but for the given ones.

    Raises InputError, with the files missing and found, if it is incomplete. ``folder`` may be None if files
    of all models are given.
    """
    _check_given_files(given_files, task)
    if folder is None:
        return _build_layout_of_files(given_files, task)
    if folder.is_file():
        raise InputError(
            f"ckpt_dir={folder} is a file; give its folder, or the file as dit_file=, "
            "and as t5_file= and vae_file= too if it holds all models"
        )
    if not folder.is_dir():
        raise InputError(f"ckpt_dir={folder} is not a folder")
    if comfyui_folder.is_comfyui_folder(folder):
        found_files = comfyui_folder.find_files(folder, task, given_files)
        return _build_layout_of_files(found_files, task, folder)
    is_diffusers = (folder / "model_index.json").exists() or (folder / "transformer").is_dir()
    if (folder / ANIMATE_2_FOLDER).is_dir():
        layout = _build_animate_2_layout(folder)
    elif is_diffusers:
        layout = _build_diffusers_layout(folder, task)
    else:
        layout = _build_original_layout(folder, task)
    layout = _use_given_files(layout, given_files)
    _check_complete(layout, folder, task, given_files)
    return layout


def _check_complete(
    layout: CheckpointLayout, folder: Path, task: Task, given_files: GivenFiles
) -> None:
    components = (
        *layout.transformers,
        *(layout.text_encoder, layout.image_encoder, layout.vae, layout.audio_encoder),
    )
    missing_files = [
        str(path.relative_to(folder))
        for component in components
        if component is not None and (path := _find_missing_file(component)) is not None
    ]
    tokenizer_folder = layout.tokenizer_folder
    if tokenizer_folder and not tokenizer_folder.is_dir() and "t5_file" not in given_files:
        missing_files.append(str(tokenizer_folder.relative_to(folder)))
    if missing_files:
        present_files = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise InputError(
            f"{folder} is not a complete {task.name} checkpoint in the {layout.name} layout: "
            f"it has no {', '.join(missing_files)} (found: {present_files})"
        )


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
        audio_encoder=_find_audio_encoder(folder, task),
        tokenizer_folder=folder / TOKENIZER_FOLDER,
    )


def _find_audio_encoder(folder: Path | None, task: Task) -> ComponentFiles | None:
    """Return the files of the task's audio encoder, None where it has none."""
    if task.audio_encoder_dims is None:
        return None
    if folder is None:
        raise InputError(
            f"{task.name} takes wav2vec2 from a folder; give ckpt_dir=FOLDER with {AUDIO_ENCODER_FOLDER}, "
            "of its repository, beside the files"
        )
    comfyui_files = sorted(folder.glob("audio_encoders/*wav2vec2*.safetensors"))
    if comfyui_files and not (folder / AUDIO_ENCODER_FOLDER).is_dir():
        file = comfyui_files[0]
        return ComponentFiles(file.parent, file.name, map_audio_encoder)
    return ComponentFiles(
        folder / AUDIO_ENCODER_FOLDER,
        "model.safetensors",
        map_audio_encoder,
        "config.json",
    )


def _build_animate_2_layout(folder: Path) -> CheckpointLayout:
    models = folder / ANIMATE_2_MODELS
    return CheckpointLayout(
        name="Animate-2",
        transformers=(
            ComponentFiles(
                folder,
                f"{ANIMATE_2_FOLDER}/{ANIMATE_2_FILE}",
                key_maps.map_single_file_transformer,
            ),
        ),
        text_encoder=ComponentFiles(models, TEXT_ENCODER_FILE, key_maps.map_original_text_encoder),
        image_encoder=ComponentFiles(
            models, IMAGE_ENCODER_FILE, key_maps.map_original_image_encoder
        ),
        vae=ComponentFiles(models, ANIMATE_2_VAE, key_maps.map_original_vae),
        tokenizer_folder=models / Path(TOKENIZER_FOLDER).name,
        # The release has none: heads are then of the published width.
        transformer_configs=(folder / "config.json",),
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
        audio_encoder=_find_audio_encoder(folder, task),
        tokenizer_folder=folder / "tokenizer",
    )


def _find_missing_file(component: ComponentFiles) -> Path | None:
    """Return the first missing file of a model, as a pattern where it may be sharded."""
    if component.setting is not None:
        return None
    folder, file_or_stem = component.folder, component.file_or_stem
    if component.config_file is not None and not (folder / component.config_file).exists():
        return folder / component.config_file
    if any(folder.glob(f"{file_or_stem}*")):
        return None
    is_file = file_or_stem.endswith(".pth")
    return folder / (file_or_stem if is_file else f"{file_or_stem}*.safetensors")


def _check_not_quantized(config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for a model that a library has quantised in its own way."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method") or quantization.get("quant_algo") or "unknown"
        raise InputError(
            f"{path} says that the model is quantised with {method}, which is not supported; "
            "use the same model in bf16, fp16, fp8, int8 or GGUF"
        )


def _check_given_files(given_files: GivenFiles, task: Task) -> None:
    """Raise InputError unless the settings' files can be opened, and are as many as the task has models."""
    if "clip_file" in given_files and not task.has_image_encoder:
        raise InputError(f"clip_file: {task.name} has no image encoder; leave it out")
    for setting, paths in given_files.items():
        num_expected = 2 if setting == "dit_file" and task.expert_boundary else 1
        if len(paths) != num_expected:
            expected = "two, those for HIGH,LOW noise" if num_expected == 2 else "one"
            raise InputError(f"{setting}: this task takes {expected}, not {len(paths)} files")
        for path in paths:
            if path.is_dir():
                raise InputError(
                    f"{setting}={path} is a folder; give the file in it, "
                    "or ckpt_dir=FOLDER for a complete checkpoint"
                )
            try:
                check_regular_file(path)
            except UnreadableFileError as error:
                raise InputError(f"{setting}={path} cannot be read: {error}") from None


def use_file(setting: str, path: Path) -> ComponentFiles:
    """Return the files of the model that a setting such as ``vae_file`` names."""
    return ComponentFiles(
        path.parent, str(path.absolute()), _SINGLE_FILE_MAPS[setting], setting=setting
    )


def _use_given_files(layout: CheckpointLayout, given_files: GivenFiles) -> CheckpointLayout:
    """Return the layout with the given files instead of the folder's."""
    components = {
        setting: [use_file(setting, path) for path in paths]
        for setting, paths in given_files.items()
    }
    changes: dict[str, Any] = {
        field: components[setting][0]
        for setting, field in (
            ("t5_file", "text_encoder"),
            ("vae_file", "vae"),
            ("clip_file", "image_encoder"),
        )
        if setting in components and getattr(layout, field) is not None
    }
    if transformers := components.get("dit_file"):
        configs = [
            transformer.folder / transformer.config_file
            for transformer in layout.transformers
            if transformer.config_file is not None
        ]
        changes["transformers"] = tuple(transformers)
        changes["transformer_configs"] = (
            *(transformer.folder / "config.json" for transformer in transformers),
            *configs,
        )
    return replace(layout, **changes)


def _build_layout_of_files(
    given_files: GivenFiles, task: Task, folder: Path | None = None
) -> CheckpointLayout:
    """Return the layout of files in any folders; ``folder`` may hold a tokenizer."""
    transformers = tuple(use_file("dit_file", path) for path in given_files["dit_file"])
    tokenizer_folders = [folder / TOKENIZER_FOLDER, folder / "tokenizer"] if folder else []
    return CheckpointLayout(
        name="ComfyUI",
        transformers=transformers,
        text_encoder=use_file("t5_file", given_files["t5_file"][0]),
        image_encoder=use_file("clip_file", given_files["clip_file"][0])
        if task.has_image_encoder
        else None,
        vae=use_file("vae_file", given_files["vae_file"][0]),
        audio_encoder=_find_audio_encoder(folder, task),
        tokenizer_folder=next((path for path in tokenizer_folders if path.is_dir()), None),
        transformer_configs=tuple(part.folder / "config.json" for part in transformers),
    )
