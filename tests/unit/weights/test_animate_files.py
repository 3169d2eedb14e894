"""Transformers of Animate in single files, as ComfyUI and llama.cpp have them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import golden_folder
from tests.weight_files import scale_to_fp8, write_gguf
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.key_maps import BLUR_KERNEL_PATTERN

CPU = torch.device("cpu")
GOLDEN, TASK = "wan2.2-animate", TASKS["animate-14B"]

Tensors = Mapping[str, Tensor]


def read_transformer(layout: str) -> dict[str, Tensor]:
    folder = golden_folder(layout)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_bf16(path: Path, tensors: Tensors) -> Tensors:
    """As ComfyUI's file: names with a prefix, no blur kernels."""
    values = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    kept = {key: value for key, value in values.items() if not BLUR_KERNEL_PATTERN.search(key)}
    assert len(values) - len(kept) == 8
    save_file({f"model.diffusion_model.{key}": value for key, value in kept.items()}, path)
    return values


def write_fp8(path: Path, tensors: Tensors) -> Tensors:
    stored, values = scale_to_fp8(
        tensors, lambda key: tensors[key].dim() == 2 and key.startswith(("blocks", "face_adapter"))
    )
    save_file(stored, path)
    return values


def write_llama(path: Path, tensors: Tensors) -> Tensors:
    return write_gguf(path.with_suffix(".gguf"), tensors)


def write_diffusers(path: Path, _: Tensors) -> Tensors:
    save_file(read_transformer(f"diffusers/{GOLDEN}"), path)
    return read_transformer(GOLDEN)


def list_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    assert checkpoint.face_encoder is not None
    components = (
        checkpoint.transformers[0],
        checkpoint.context_projections[0],
        checkpoint.face_encoder,
    )
    return {
        f"{type(model).__name__} {name}": value
        for model in (component.load(CPU) for component in components)
        for name, value in model.named_parameters()
    }


def copy_golden(folder: Path) -> Path:
    """Return the golden's folder with no transformer."""
    shutil.copytree(
        golden_folder(GOLDEN),
        folder,
        ignore=shutil.ignore_patterns("expected", "driving", "diffusion_pytorch_model*"),
    )
    return folder


@pytest.mark.parametrize("write", [write_bf16, write_fp8, write_llama, write_diffusers])
def test_a_file_has_the_weights_of_a_checkpoint(
    write: Callable[[Path, Tensors], Tensors], tmp_path: Path
) -> None:
    folder = copy_golden(tmp_path / "checkpoint")
    file = tmp_path / "file/animate.safetensors"
    file.parent.mkdir()
    shutil.copy(folder / "config.json", file.parent)  # its heads are narrower than the published
    values = write(file, read_transformer(GOLDEN))
    (file,) = (path for path in file.parent.iterdir() if path.suffix != ".json")
    save_file(dict(values), folder / "diffusion_pytorch_model.safetensors")
    found, expected = (
        list_weights(open_checkpoint(folder, TASK, torch.float32, given_files=files))
        for files in ({"dit_file": [file]}, {})
    )
    assert found.keys() == expected.keys()
    assert any("fuser_blocks" in name for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    """I2V-14B has the same channels and image branch."""
    folder = copy_golden(tmp_path / "checkpoint")
    animate, image_to_video = folder / "animate.safetensors", folder / "i2v.safetensors"
    tensors = read_transformer(GOLDEN)
    save_file(tensors, animate)
    added = ("pose_patch_embedding.", "motion_encoder.", "face_")
    save_file(
        {key: value for key, value in tensors.items() if not key.startswith(added)}, image_to_video
    )
    for task, wrong, problem in (
        ("i2v-14B", animate, "16 pose channels, not 0"),
        ("animate-14B", image_to_video, "0 pose channels, not 16"),
    ):
        with pytest.raises(InputError, match=f"not a {task} checkpoint: .*{problem}"):
            open_checkpoint(folder, TASKS[task], torch.float32, given_files={"dit_file": [wrong]})


def test_the_file_in_comfyuis_folder_is_that_of_the_task(tmp_path: Path) -> None:
    golden, models = golden_folder(GOLDEN), tmp_path / "models"
    for folder in ("diffusion_models", "text_encoders", "vae", "clip_vision"):
        (models / folder).mkdir(parents=True)
    for folder, pattern in (("text_encoders", "*t5*"), ("vae", "*VAE*"), ("clip_vision", "*clip*")):
        (file,) = golden.glob(pattern)
        (models / folder / file.name).symlink_to(file)
    (models / "google").symlink_to(golden / "google")
    config = json.loads((golden / "config.json").read_text())
    (models / "diffusion_models/config.json").write_text(json.dumps(config))
    tensors = read_transformer(GOLDEN)
    added = ("pose_patch_embedding.", "motion_encoder.", "face_")
    plain = {key: value for key, value in tensors.items() if not key.startswith(added)}
    save_file(tensors, models / "diffusion_models/animate.safetensors")
    save_file(plain, models / "diffusion_models/i2v.safetensors")
    for task, name in (("animate-14B", "animate"), ("i2v-14B", "i2v")):
        checkpoint = open_checkpoint(models, TASKS[task], torch.float32)
        assert f"{name}.safetensors" in str(checkpoint.transformers[0].files)
