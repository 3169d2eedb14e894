"""Files of a task's repository that a run can read, as patterns for a download."""

from pathlib import Path

from wan_dist.tasks.base import Task
from wan_dist.weights.layout import (
    ANIMATE_2_FILE,
    ANIMATE_2_FOLDER,
    ANIMATE_2_MODELS,
    ANIMATE_2_VAE,
    AUDIO_ENCODER_FOLDER,
    IMAGE_ENCODER_FILE,
    NO_FILES,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_STEM,
    GivenFiles,
    get_vae_file_name,
)


def list_download_patterns(task: Task, given_files: GivenFiles = NO_FILES) -> list[str]:
    """Return glob patterns of all files that a run can read from the task's repository, and no others.

    Published repositories are in the original layout. ``given_files`` are used instead of some.
    """
    if task.is_animate_2:
        return _list_animate_2_patterns(given_files)
    folders = ("high_noise_model/", "low_noise_model/") if task.expert_boundary else ("",)
    patterns = [
        f"{folder}{name}"
        for folder in folders
        for name in ("config.json", f"{WEIGHTS_STEM}*.safetensors*")
        if name == "config.json" or "dit_file" not in given_files
    ]
    file_names = {"t5_file": TEXT_ENCODER_FILE, "vae_file": get_vae_file_name(task)}
    if task.has_image_encoder:
        file_names["clip_file"] = IMAGE_ENCODER_FILE
    patterns += [name for setting, name in file_names.items() if setting not in given_files]
    if task.audio_encoder_dims is not None:
        patterns += [
            f"{AUDIO_ENCODER_FOLDER}/{name}" for name in ("config.json", "model.safetensors")
        ]
    return [*patterns, f"{TOKENIZER_FOLDER}/*", *task.lora_files]


def _list_animate_2_patterns(given_files: GivenFiles) -> list[str]:
    names = {
        "dit_file": f"{ANIMATE_2_FOLDER}/{ANIMATE_2_FILE}",
        "t5_file": f"{ANIMATE_2_MODELS}/{TEXT_ENCODER_FILE}",
        "vae_file": f"{ANIMATE_2_MODELS}/{ANIMATE_2_VAE}",
        "clip_file": f"{ANIMATE_2_MODELS}/{IMAGE_ENCODER_FILE}",
    }
    files = [name for setting, name in names.items() if setting not in given_files]
    return [*files, f"{ANIMATE_2_MODELS}/{Path(TOKENIZER_FOLDER).name}/*"]
