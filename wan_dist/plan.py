"""RunConfig + task -> Plan: every derived number and every error that crosses fields. No torch, so that it answers at once."""

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_dist.catalog import Task, get_task
from wan_dist.config import RunConfig
from wan_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, in numbers."""

    task: Task
    prompt: str
    negative_prompt: str | None
    """None where guidance is off."""
    width: int
    height: int
    frame_num: int
    fps: int
    seed: int
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w)."""
    num_tokens: int
    name: str
    """File name of the results, without suffix."""

    @property
    def advice(self) -> str | None:
        """What the user should know before it starts, if anything."""
        if not self.task.sizes or (self.width, self.height) in self.task.sizes:
            return None
        sizes = ", ".join(f"{width}*{height}" for width, height in self.task.sizes)
        return f"{self.task.name} was published for the sizes {sizes}; {self.width}*{self.height} works but may look worse"

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.task.still:
            return f"{self.task.name}: an image of {self.width}x{self.height}, seed {self.seed}"
        seconds = self.frame_num / self.fps
        return (
            f"{self.task.name}: {self.frame_num} frames of {self.width}x{self.height} at {self.fps} fps = {seconds:.1f} s of video, "
            f"seed {self.seed}, {self.num_tokens} tokens"
        )


def make_plan(config: RunConfig) -> Plan:
    """Resolve what the configuration leaves open; raises InputError with what would work if the fields do not fit together."""
    task = get_task(config.task)
    _check_ranks()
    width, height = config.width_height()
    frame_num = config.frame_num
    if config.latents is not None:
        width, height, frame_num = _size_of_latents(config.latents, task)
    _check_size(width, height, task)
    _check_frames(frame_num, task)
    prompt = _text("prompt", config.prompt)
    if prompt is None and config.latents is None:
        raise InputError('prompt is missing; say what to show, e.g. prompt="two cats boxing on a stage", or prompt=@file.txt')
    seed = random.SystemRandom().randrange(2**32) if config.seed == -1 else config.seed
    latent_frames = (frame_num - 1) // task.stride[0] + 1
    rows, columns = height // task.stride[1], width // task.stride[2]
    return Plan(
        task=task,
        prompt=prompt or "",
        negative_prompt=None if config.sample.guide_scale == 1 else _text("negative_prompt", config.negative_prompt) or "",
        width=width,
        height=height,
        frame_num=frame_num,
        fps=config.fps,
        seed=seed,
        latent_shape=(task.latent_channels, latent_frames, rows, columns),
        num_tokens=(latent_frames // task.patch[0]) * (rows // task.patch[1]) * (columns // task.patch[2]),
        name=_file_name(config, prompt, seed),
    )


def _check_ranks() -> None:
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        raise InputError(f"{num_ranks} ranks were launched, but only one is supported yet; start with python -m wan_dist.run")


def _check_frames(frame_num: int, task: Task) -> None:
    if task.still and frame_num != 1:
        raise InputError(f"frame_num={frame_num}: {task.name} makes one image, frame_num=1")
    stride = task.stride[0]
    if frame_num < 1 or (frame_num - 1) % stride:
        below = max(frame_num - 1, 0) // stride * stride + 1
        raise InputError(f"frame_num={frame_num} is not {stride}n + 1; the nearest that work are {below} and {below + stride}")


def _check_size(width: int, height: int, task: Task) -> None:
    across, down = task.multiple
    if width % across == 0 and height % down == 0:
        return
    smaller = f"{max(width // across, 1) * across}*{max(height // down, 1) * down}"
    larger = f"{-(-width // across) * across}*{-(-height // down) * down}"
    raise InputError(
        f"size={width}*{height}: the width must be a multiple of {across} and the height of {down}; "
        f"the nearest that work are {smaller} and {larger}"
    )


def _text(key: str, value: str | None) -> str | None:
    """Return the text, or the contents of the file after ``@``."""
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{key}={value}: cannot read {path} ({getattr(fault, 'strerror', None) or 'it is not UTF-8 text'})") from None
    if not text and key == "prompt":
        raise InputError(f"{key}={value}: the file is empty")
    return text


def _file_name(config: RunConfig, prompt: str | None, seed: int) -> str:
    if config.output.name is not None:
        return config.output.name.removesuffix(".mp4").removesuffix(".png")
    if config.latents is not None:
        return Path(config.latents).name.removesuffix(".safetensors").removesuffix(".latents")
    words = re.sub(r"\W+", "-", prompt or "").strip("-")[:40].strip("-")
    return "_".join(part for part in (config.task, words, str(seed)) if part)


def _size_of_latents(file: str, task: Task) -> tuple[int, int, int]:
    """Return width, height and frames of the video that kept latents hold."""
    try:
        with safe_open(Path(file).expanduser(), framework="numpy") as tensors:
            shape = tensors.get_slice("latents").get_shape()
    except (OSError, SafetensorError) as fault:
        raise InputError(f"latents={file} cannot be read as kept latents: {fault}") from None
    if len(shape) != 4 or shape[0] != task.latent_channels:
        raise InputError(f"latents={file} has shape {tuple(shape)}; {task.name} needs ({task.latent_channels}, T, h, w)")
    return shape[3] * task.stride[2], shape[2] * task.stride[1], (shape[1] - 1) * task.stride[0] + 1
