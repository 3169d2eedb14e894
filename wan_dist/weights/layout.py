"""Which files of a checkpoint folder hold what, in either of the published layouts, told apart by looking.

Original: files at the top, transformers of two experts in folders of their own. Diffusers: a folder for each model.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableError, check_file, read_object
from wan_dist.tasks.registry import Task
from wan_dist.weights import key_maps as names
from wan_dist.weights.files import TensorFiles, open_sharded
from wan_dist.weights.key_maps import KeyMap

WEIGHTS = "diffusion_pytorch_model"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Of files with weights, in either case; what is in them does not depend on it."""


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: where it is and how its keys are read."""

    folder: Path
    file: str
    """A file's name, or the stem of sharded ``.safetensors``; absolute: a file of any name."""
    keys: Callable[[Collection[str]], KeyMap]
    config: str | None = None

    def open(self) -> tuple[dict[str, Any], TensorFiles, KeyMap]:
        """Return config, files and key map; headers are read, weights are not. Raises InputError for missing or damaged files."""
        config: dict[str, Any] = {}
        if self.config is not None:
            config = read_object(self.folder / self.config)
        path = Path(self.file)
        is_file = path.is_absolute() or path.suffix.lower() in SUFFIXES
        files = TensorFiles([self.folder / path]) if is_file else open_sharded(self.folder, self.file)
        return config, files, self.keys(files.shapes)


@dataclass(frozen=True)
class Layout:
    """Where the models of a task are. ``transformers``: one, or those for high and for low noise."""

    name: str
    transformers: tuple[Part, ...]
    text_encoder: Part
    image_encoder: Part | None
    vae: Part
    tokenizer: Path


def vae_file(task: Task) -> str:
    """Return the name of the task's VAE file in the original layout."""
    return "Wan2.2_VAE.pth" if task.latent_channels == 48 else "Wan2.1_VAE.pth"


def download_patterns(task: Task) -> list[str]:
    """Return glob patterns of all that a run reads from the task's repository (original layout): what to fetch, and nothing else."""
    folders = ("high_noise_model/", "low_noise_model/") if task.boundary else ("",)
    patterns = [f"{folder}{name}" for folder in folders for name in ("config.json", f"{WEIGHTS}*.safetensors*")]
    patterns += [TEXT_ENCODER, vae_file(task), f"{TOKENIZER}/*"]
    return [*patterns, IMAGE_ENCODER] if task.looks_at_images else patterns


def find_layout(folder: Path, task: Task, transformer_files: Sequence[Path] = ()) -> Layout:
    """Return the layout of a folder; raises InputError with what was found and what was wanted if it is not whole."""
    if not folder.is_dir():
        raise InputError(f"ckpt_dir={folder} is not a folder")
    is_diffusers = (folder / "model_index.json").exists() or (folder / "transformer").is_dir()
    layout = _diffusers(folder, task) if is_diffusers else _original(folder, task)
    if transformer_files:
        layout = replace(layout, transformers=_in_files(layout.transformers, transformer_files))
    parts = (*layout.transformers, layout.text_encoder, layout.image_encoder, layout.vae)
    missing = [str(path.relative_to(folder)) for part in parts if part is not None and (path := _missing(part)) is not None]
    if not layout.tokenizer.is_dir():
        missing.append(str(layout.tokenizer.relative_to(folder)))
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise InputError(
            f"{folder} is not a whole {task.name} checkpoint in the {layout.name} layout: it has no {', '.join(missing)} (found: {found})"
        )
    return layout


def _original(folder: Path, task: Task) -> Layout:
    places = ("high_noise_model", "low_noise_model") if task.boundary else (".",)
    return Layout(
        name="original",
        transformers=tuple(Part(folder / place, WEIGHTS, names.original_transformer, "config.json") for place in places),
        text_encoder=Part(folder, _either(folder, TEXT_ENCODER), names.original_text_encoder),
        image_encoder=Part(folder, _either(folder, IMAGE_ENCODER), names.original_image_encoder) if task.looks_at_images else None,
        vae=Part(folder, _either(folder, vae_file(task)), names.original_vae),
        tokenizer=folder / TOKENIZER,
    )


def _either(folder: Path, file: str) -> str:
    """Return the name of a file that is published as .pth, or where that is not there the same with another suffix of weights."""
    if (folder / file).is_file():
        return file
    stem = Path(file).stem.casefold()
    others = [path.name for path in folder.iterdir() if path.stem.casefold() == stem and path.suffix.lower() in SUFFIXES]
    return min(others, default=file, key=lambda name: (SUFFIXES.index(Path(name).suffix.lower()), name))


def _diffusers(folder: Path, task: Task) -> Layout:
    places = ("transformer", "transformer_2") if task.boundary else ("transformer",)
    image_encoder = Part(folder / "image_encoder", "model", names.diffusers_image_encoder, "config.json")
    return Layout(
        name="Diffusers",
        transformers=tuple(Part(folder / place, WEIGHTS, names.diffusers_transformer, "config.json") for place in places),
        text_encoder=Part(folder / "text_encoder", "model", names.diffusers_text_encoder, "config.json"),
        image_encoder=image_encoder if task.looks_at_images else None,
        vae=Part(folder / "vae", WEIGHTS, names.diffusers_vae, "config.json"),
        tokenizer=folder / "tokenizer",
    )


def _missing(part: Part) -> Path | None:
    """Return the first of a part's files that is not there, as a pattern where it may be sharded."""
    if part.config is not None and not (part.folder / part.config).exists():
        return part.folder / part.config
    if Path(part.file).is_absolute() or any(part.folder.glob(f"{part.file}*")):
        return None
    return part.folder / (part.file if part.file.endswith(".pth") else f"{part.file}*.safetensors")


def _in_files(transformers: tuple[Part, ...], paths: Sequence[Path]) -> tuple[Part, ...]:
    """Return the transformers with their weights in these files, one each."""
    if len(paths) != len(transformers):
        wanted = "two, those for HIGH,LOW noise" if len(transformers) == 2 else "one"
        raise InputError(f"dit_file: this task takes {wanted}, not {len(paths)} files")
    for path in paths:
        if path.is_dir():
            raise InputError(f"dit_file={path} is a folder; give the file in it, or ckpt_dir=FOLDER for a whole checkpoint")
        try:
            check_file(path)
        except UnreadableError as fault:
            raise InputError(f"dit_file={path} cannot be read: {fault}") from None
    pairs = zip(transformers, paths, strict=True)
    return tuple(replace(part, file=str(path.absolute()), keys=names.single_file_transformer) for part, path in pairs)
