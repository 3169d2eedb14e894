"""Configuration schema: settings of the command line and ``conf/``, with types and single-field checks.

Checks across fields belong to ``planning/plan.py``. Strings such as ``size`` are parsed here, once.
"""

import math
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from wan_dist.config.checks import check_choice, check_text
from wan_dist.config.choices import (
    ATTENTION_BACKENDS,
    DEVICES,
    FITS,
    NOISE_DEVICES,
    NOISE_LAYOUTS,
    QUANTIZATIONS,
    SYNC_CHOICES,
)
from wan_dist.config.loras import UNMATCHED_CHOICES, list_given_loras
from wan_dist.config.output_section import OutputConfig
from wan_dist.config.sections import (
    DTYPES,
    CacheConfig,
    FsdpConfig,
    MemoryConfig,
    ParallelConfig,
    SampleConfig,
    ServeConfig,
)
from wan_dist.config.settings import ALL_EFFECTS, Effect, SettingValues, collect_settings
from wan_dist.config.settings import add_setting as _key
from wan_dist.runtime.errors import InputError

_MAX_FPS = 1000


@dataclass(kw_only=True)
class RunConfig:
    """Settings of a run. ``null`` means: the task's default, or chosen by the program."""

    task: str = _key(MISSING, "what to generate (required)", ALL_EFFECTS)
    preset: str | None = _key(
        None, "few-step model whose sampling settings are used, e.g. lightx2v-4step; null: none"
    )
    ckpt_dir: str | None = _key(
        None,
        "checkpoint folder, or ComfyUI's models folder; "
        "null: the task's repository from the Hugging Face cache, or downloaded",
        Effect.WEIGHTS,
    )
    dit_file: str | None = _key(
        None,
        "file of the transformer's weights, also fp8 or GGUF, used instead of ckpt_dir's; two "
        "experts: HIGH,LOW",
        Effect.WEIGHTS,
    )
    t5_file: str | None = _key(
        None,
        "file of the text encoder's weights, used instead of ckpt_dir's",
        Effect.WEIGHTS,
        is_new=True,
    )
    vae_file: str | None = _key(
        None,
        "file of the VAE's weights, used instead of ckpt_dir's",
        Effect.WEIGHTS,
        is_new=True,
    )
    clip_file: str | None = _key(
        None,
        "file of the image encoder's weights, used instead of ckpt_dir's",
        Effect.WEIGHTS,
        is_new=True,
    )
    lora: str | None = _key(
        None, "LoRA files added to the weights: FILE or [FILE,FILE]", Effect.WEIGHTS, is_new=True
    )
    lora_strength: Any = _key(
        1.0, "how strong lora is: a number, or one for each file", Effect.WEIGHTS, is_new=True
    )
    lora_high: str | None = _key(
        None, "LoRA files of the high-noise expert alone", Effect.WEIGHTS, is_new=True
    )
    lora_high_strength: Any = _key(1.0, "how strong lora_high is", Effect.WEIGHTS, is_new=True)
    lora_low: str | None = _key(
        None, "LoRA files of the low-noise expert alone", Effect.WEIGHTS, is_new=True
    )
    lora_low_strength: Any = _key(1.0, "how strong lora_low is", Effect.WEIGHTS, is_new=True)
    lora_unmatched: str = _key(
        "error",
        "parts of a LoRA that the model does not have: error or allow",
        Effect.MODELS,
        is_new=True,
    )
    prompt: str | None = _key(
        None,
        "description of the video, as plain text; prompt=@file.txt reads a file, @@ is a plain @",
        Effect.LATENTS,
    )
    negative_prompt: str | None = _key(
        None,
        "description of what to avoid; null: the task's; @file.txt reads a file",
        Effect.LATENTS,
    )
    prompt_ref: str | None = _key(
        None,
        "description of a driving video, with animate-2-14B; null: the task's; @file.txt reads a file",
        Effect.LATENTS,
        is_new=True,
    )
    image: str | None = _key(None, "first frame of the video", Effect.LATENTS)
    first_frame: str | None = _key(
        None, "first frame of the video, where there is a last_frame", Effect.LATENTS
    )
    last_frame: str | None = _key(
        None, "last frame of the video; scaled and cropped to the first one's shape", Effect.LATENTS
    )
    src_video: str | None = _key(
        None, "video that steers the new one, or that is changed", Effect.LATENTS, is_new=True
    )
    src_mask: str | None = _key(
        None,
        "video, or an image for all frames, that is white where src_video is generated anew",
        Effect.LATENTS,
        is_new=True,
    )
    src_ref_images: str | None = _key(
        None,
        "images of what is to appear: FILE or [FILE,FILE], of which the models know three at most",
        Effect.LATENTS,
        is_new=True,
    )
    camera: str | None = _key(
        None,
        "path of the camera: file of poses, as RealEstate10K's, or a motion: static, pan_left, "
        "pan_right, pan_up, pan_down, pan_left_up ..., zoom_in, zoom_out, clockwise, anticlockwise",
        Effect.LATENTS,
        is_new=True,
    )
    fit: str = _key(
        "stretch",
        "how pictures get the size of a Fun model's video: stretch, as its makers do, or crop",
        Effect.LATENTS,
        is_new=True,
    )
    src_root_path: str | None = _key(
        None,
        "folder with the files of a driving video: src_pose.mp4, src_face.mp4, src_ref.png, and to "
        "replace a person src_bg.mp4 and src_mask.mp4",
        Effect.LATENTS,
        is_new=True,
    )
    src_pose: str | None = _key(
        None,
        "video of the driving person's poses, which gives the size",
        Effect.LATENTS,
        is_new=True,
    )
    src_face: str | None = _key(
        None, "video of the driving person's face", Effect.LATENTS, is_new=True
    )
    src_ref: str | None = _key(
        None, "image of the character that is to move", Effect.LATENTS, is_new=True
    )
    src_bg: str | None = _key(
        None, "driving video without its person, with replace_flag", Effect.LATENTS, is_new=True
    )
    replace_flag: bool = _key(
        False,
        "put the character into the driving video, instead of its person",
        Effect.LATENTS,
        is_new=True,
    )
    use_relighting_lora: bool = _key(
        False,
        "add the relighting LoRA of the checkpoint's folder, which fits the character's light to the "
        "driving video",
        Effect.WEIGHTS,
        is_new=True,
    )
    refert_num: int = _key(
        1,
        "frames of a clip that the next one starts from, with a driving video: 1 or 5",
        Effect.LATENTS,
        is_new=True,
    )
    audio: str | None = _key(None, "sound that the picture speaks to", Effect.LATENTS, is_new=True)
    pose_video: str | None = _key(
        None, "video of poses that the speaking picture takes", Effect.LATENTS, is_new=True
    )
    num_clip: int | None = _key(
        None,
        "clips of a speaking picture at most; null: all of the sound",
        Effect.LATENTS,
        is_new=True,
    )
    infer_frames: int = _key(
        80, "frames of a clip of a speaking picture, a multiple of 4", Effect.LATENTS, is_new=True
    )
    start_from_ref: bool = _key(
        False,
        "begin the video of a speaking picture with the picture itself",
        Effect.LATENTS,
        is_new=True,
    )
    sync: str = _key(
        "exact",
        "times of a speaking picture's sound and poses: exact, or reference, whose picture is 187.5 ms early",
        Effect.RESULT,
        is_new=True,
    )
    first_frame_bias: float = _key(
        0.0,
        "added to attention to the first frame: -1.3 with the distilled model of animate-2-14B",
        Effect.LATENTS,
        is_new=True,
    )
    context_scale: float = _key(
        1.0, "how strongly src_video and src_ref_images steer", Effect.LATENTS, is_new=True
    )
    size: str = _key(
        MISSING,
        "WIDTHxHEIGHT in pixels, as 832x480 (* is accepted too); "
        "with an image or a source video an area, which keeps their aspect",
        Effect.LATENTS,
    )
    max_area: int | None = _key(
        None, "area in pixels, instead of size, where there is an image", Effect.LATENTS
    )
    frame_num: int = _key(MISSING, "number of frames, 4n + 1", Effect.LATENTS)
    clips: int = _key(
        1,
        "clips of frame_num frames that make the video, each from the last frame of the one before; "
        "tasks with one image",
        Effect.LATENTS,
        is_new=True,
    )
    fps: int = _key(MISSING, "frames per second of the video file", Effect.RESULT)
    seed: int = _key(42, "seed of the noise; -1 draws one and prints it", Effect.LATENTS)
    noise_device: str = _key(
        "cpu",
        "where the noise is drawn: cpu (the same everywhere) or cuda (the reference's on a GPU)",
        Effect.LATENTS,
    )
    noise_layout: str = _key(
        "channels_first",
        "order in which the noise's numbers are drawn: channels_first, or frames_first as FastWan's "
        "and CausVid's samplers",
        Effect.LATENTS,
        is_new=True,
    )
    device: str = _key("auto", "auto, cuda or cpu")
    dtype: str = _key("bfloat16", "bfloat16, or float32 for comparisons", ALL_EFFECTS)
    quant: str = _key(
        "none",
        "none, fp8, int8 or int4: quantises the transformer's linears, except in the "
        "first and last block",
        Effect.MODELS | Effect.LATENTS,
    )
    attention: str = _key(
        "auto",
        "auto, fa4, fa3 or fa2 (FlashAttention), cudnn, flash or sdpa (PyTorch), "
        "sdpa16 (in float16), 8bit or sage (in 8 bits); sla or vsa: of a transformer that was "
        "trained with it, as auto has it",
        Effect.MODELS | Effect.LATENTS,
    )
    sla_topk: float = _key(
        0.1,
        "share of the key blocks that sparse-linear attention (SLA) attends to; 0.15 is recommended for "
        "quality",
        Effect.LATENTS,
        is_new=True,
    )
    vsa_sparsity: float | None = _key(
        None,
        "share of the key tiles that video sparse attention (VSA) leaves out; null: 0.8 for models as wide "
        "as 1.3B, 0.9 for wider ones",
        Effect.LATENTS,
        is_new=True,
    )
    latents: str | None = _key(
        None, "file of saved latents, which are decoded instead of denoising", Effect.LATENTS
    )
    jobs: str | None = _key(
        None,
        "job file: one prompt per line, or .jsonl, .json, .csv or .tsv with any of these keys",
    )
    retry_failed: bool = _key(False, "run jobs again that have failed before")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        self._check_text_settings()
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quant", self.quant, QUANTIZATIONS)
        check_choice("attention", self.attention, ATTENTION_BACKENDS)
        check_choice("device", self.device, DEVICES)
        check_choice("noise_device", self.noise_device, NOISE_DEVICES)
        check_choice("fit", self.fit, FITS)
        check_choice("sync", self.sync, SYNC_CHOICES)
        check_choice("noise_layout", self.noise_layout, NOISE_LAYOUTS)
        check_choice("lora_unmatched", self.lora_unmatched, UNMATCHED_CHOICES)
        list_given_loras(self)
        if not 0 < self.sla_topk <= 1:
            raise InputError(f"sla_topk={self.sla_topk} must be above 0 and at most 1")
        if self.vsa_sparsity is not None and not 0 <= self.vsa_sparsity < 1:
            raise InputError(f"vsa_sparsity={self.vsa_sparsity} must be at least 0 and below 1")
        self.parse_size()
        if self.clips < 1:
            raise InputError(f"clips={self.clips} must be at least 1")
        if self.fps < 1:
            raise InputError(f"fps={self.fps} must be at least 1")
        if self.fps > _MAX_FPS:
            raise InputError(f"fps={self.fps} must be at most {_MAX_FPS}, which players show")
        if self.seed < -1:
            raise InputError(f"seed={self.seed} must be 0 or larger, or -1 to draw one")
        if self.seed >= 2**64:
            raise InputError(f"seed={self.seed} must be at most 2^64 - 1")
        if not math.isfinite(self.context_scale):
            raise InputError(f"context_scale={self.context_scale} is not finite")
        if self.max_area is not None and self.max_area < 1:
            raise InputError(f"max_area={self.max_area} must be above 0, in pixels")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError(
                'prompt is empty; describe the video, e.g. prompt="two cats boxing on a stage"'
            )

    def _check_text_settings(self) -> None:
        """Raise InputError for texts that are not UTF-8, or cannot be the path that they are to be."""
        for key, getter in _list_text_getters().items():
            if (value := getter(self)) is not None:
                check_text(key, value)

    def parse_size(self) -> tuple[int, int]:
        """Return ``size`` as (width, height) in pixels; raises InputError."""
        match = re.fullmatch(r"([1-9][0-9]{0,9})[*xX×]([1-9][0-9]{0,9})", self.size.strip())
        if not match:
            raise InputError(f"size={self.size} is not WIDTHxHEIGHT, e.g. size=832x480")
        return int(match[1]), int(match[2])


@cache
def _list_text_getters() -> dict[str, Callable[[RunConfig], str | None]]:
    return {
        key: attrgetter(key)
        for key, setting in list_settings().items()
        if setting.type in (str, str | None)
    }


@cache
def list_settings() -> dict[str, Field[Any]]:
    """Return every settable key, dotted, with its dataclass field."""
    return collect_settings(RunConfig)


def read_all_settings(config: RunConfig) -> dict[str, Any]:
    """Return the values of all settings by dotted key."""
    return {key: attrgetter(key)(config) for key in list_settings()}


def read_settings(config: RunConfig, effect: Effect) -> dict[str, Any]:
    """Return the settings with one of these effects, by dotted key, without new ones at their default."""
    settings = list_settings()
    return {
        key: value
        for key, value in read_all_settings(config).items()
        if settings[key].metadata["effect"] & effect
        and not (settings[key].metadata["is_new"] and value == settings[key].default)
    }


def select_new_settings(values: SettingValues) -> dict[str, Any]:
    """Return those settings that earlier versions did not have."""
    settings = list_settings()
    return {key: value for key, value in values.items() if settings[key].metadata["is_new"]}


@cache
def register_schema() -> None:
    """Register the schema with Hydra, as the base of ``conf/config.yaml``."""
    ConfigStore.instance().store(name="base_config", node=RunConfig)
