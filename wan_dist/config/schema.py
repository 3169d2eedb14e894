"""Configuration schema: settings of the command line and ``conf/``, with types and single-field checks.

Checks across fields belong to ``planning/plan.py``. Strings such as ``size`` are parsed here, once.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from wan_dist.config.checks import check_choice, check_file_name, check_positive, check_text
from wan_dist.config.paths import find_user_cache
from wan_dist.runtime.errors import InputError

SOLVERS = ("unipc", "dpm++", "euler")
DTYPES = ("bfloat16", "float32")
STEP_CACHES = ("easy", "tea")
EIGHT_BIT_BACKENDS = ("8bit", "sage")
ATTENTION_BACKENDS = (
    "auto",
    "fa4",
    "fa3",
    "fa2",
    "cudnn",
    "flash",
    "sdpa",
    "sdpa16",
    *EIGHT_BIT_BACKENDS,
)
QUANTIZATIONS = ("none", "fp8", "int8", "int4")
USP_IMPLEMENTATIONS = ("plain", "xfuser")
VAE_STRATEGIES = ("parallel", "whole", "tiled", "cpu")
DIT_PLACEMENTS = ("resident", "stream", "disk")
T5_PLACEMENTS = ("gpu", "stream", "cpu")
GUIDANCE_PASSES = ("together", "apart")
DEVICES = ("auto", "cuda", "cpu")
NOISE_DEVICES = ("cpu", "cuda")
MAX_STEPS = 1000
_MAX_TIMEOUT_SECONDS = 365 * 86400
_MAX_FPS = 1000


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class SampleConfig:
    """How the latents are denoised."""

    solver: str = _key("unipc", "unipc, dpm++ or euler")
    steps: int = _key(50, "denoising steps")
    shift: float | None = _key(
        None,
        "shift of the noise schedule: larger spends more steps on strong noise; null: by the size",
    )
    guide_scale: Any = _key(
        5.0,
        "scale of classifier-free guidance, or [low, high] noise for two experts; 1 turns it off",
    )

    def __post_init__(self) -> None:
        check_choice("sample.solver", self.solver, SOLVERS)
        if self.steps < 1:
            raise InputError(f"sample.steps={self.steps}: at least 1 step is needed")
        if self.steps > MAX_STEPS:
            raise InputError(
                f"sample.steps={self.steps}: the models know {MAX_STEPS} noise levels, "
                "so more steps do nothing"
            )
        check_positive("sample.shift", self.shift, hint=" (published defaults are 3.0 to 16.0)")
        self.parse_guide_scales()

    def parse_guide_scales(self) -> tuple[float, float]:
        """Return the guidance scales for (low, high) noise; raises InputError."""
        scales = self.guide_scale if isinstance(self.guide_scale, list) else [self.guide_scale] * 2
        if len(scales) != 2 or any(
            isinstance(scale, bool) or not isinstance(scale, int | float) for scale in scales
        ):
            raise InputError(
                f"sample.guide_scale={self.guide_scale} is neither a number nor [low, high], "
                "e.g. 5.0 or [3.0,4.0]"
            )
        if not all(abs(scale) <= sys.float_info.max for scale in scales):
            raise InputError(f"sample.guide_scale={self.guide_scale}: it must be finite, e.g. 5.0")
        return float(scales[0]), float(scales[1])


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks; the product of the degrees is the number of ranks."""

    dp: int | None = _key(None, "replicas, each for videos of its own; null: planned")
    cfg: int | None = _key(None, "2: the two passes of guidance side by side; null: planned")
    ring: int | None = _key(None, "ranks that pass keys and values around; null: planned")
    ulysses: int | None = _key(
        None, "ranks that trade tokens for heads, a divisor of the heads; null: planned"
    )
    usp: str = _key(
        "plain",
        "what does Ulysses and ring: plain (any number of tokens) or xfuser (a number that the ranks divide)",
    )
    timeout: float = _key(
        600.0,
        "seconds without a sign of life, or in an exchange while denoising, "
        "after which ranks give each other up",
    )
    load_timeout: float = _key(
        3600.0,
        "seconds of an exchange while texts are encoded and weights are read, which a slow disk draws out",
    )

    def __post_init__(self) -> None:
        check_choice("parallel.usp", self.usp, USP_IMPLEMENTATIONS)
        for key in ("timeout", "load_timeout"):
            check_positive(f"parallel.{key}", timeout_seconds := getattr(self, key), "seconds")
            if timeout_seconds > _MAX_TIMEOUT_SECONDS:
                raise InputError(
                    f"parallel.{key}={timeout_seconds}: more than {_MAX_TIMEOUT_SECONDS} s, a year, "
                    "cannot be waited"
                )


@dataclass(kw_only=True)
class FsdpConfig:
    """Which weights are sharded over the ranks."""

    dit: bool | None = _key(None, "shard the transformer; null: where it is larger than 12 GiB")
    t5: bool | None = _key(
        None, "shard the text encoder; null: no, the first rank has it while it encodes"
    )


@dataclass(kw_only=True)
class MemoryConfig:
    """How models and videos fit into memory."""

    dit: str | None = _key(
        None,
        "the transformer's weights: resident, stream (from host memory) or disk (read each step); "
        "null: planned",
    )
    t5: str | None = _key(
        None,
        "where the text encoder works: gpu, stream (on the GPU, block by block from disk) or cpu; "
        "null: planned",
    )
    slice_tokens: int | None = _key(
        None, "tokens that go through the transformer's linears at once; null: planned"
    )
    passes: str | None = _key(
        None,
        "the two passes of guidance through each block: together, or apart, for less memory; null: planned",
    )
    vae: str | None = _key(
        None,
        "where the VAE works: parallel (a strip a rank), whole, tiled or cpu; "
        "null: parallel if there are ranks",
    )
    vae_dtype: str | None = _key(
        None, "bfloat16 or float32; null: the run's dtype on a GPU, float32 on a CPU"
    )
    budget_gib: float | None = _key(
        None, "GPU memory that a rank may take, in GiB; null: all there is"
    )
    host_budget_gib: float | None = _key(
        None, "host memory that the ranks of a node may take together, in GiB; null: what is free"
    )

    def __post_init__(self) -> None:
        choices_by_key = {
            "dit": DIT_PLACEMENTS,
            "t5": T5_PLACEMENTS,
            "passes": GUIDANCE_PASSES,
            "vae": VAE_STRATEGIES,
            "vae_dtype": DTYPES,
        }
        for key, allowed_choices in choices_by_key.items():
            if (value := getattr(self, key)) is not None:
                check_choice(f"memory.{key}", value, allowed_choices)
        if self.slice_tokens is not None and self.slice_tokens < 1:
            raise InputError(f"memory.slice_tokens={self.slice_tokens}: at least 1 token is needed")
        for key in ("budget_gib", "host_budget_gib"):
            check_positive(f"memory.{key}", getattr(self, key), "GiB")


@dataclass(kw_only=True)
class CacheConfig:
    """Caches of earlier results.

    Prompt embeddings, so that a prompt seen before needs no text encoder, and velocities of steps.
    """

    dir: str | None = _key(
        "auto",
        "folder of kept prompt embeddings; auto: wan-dist/prompts in the user's cache; null: none are kept",
    )
    size_gib: float = _key(
        1.0, "the most that they may take on disk, in GiB; the longest unused go first"
    )
    steps: str | None = _key(
        None,
        "easy or tea: guess steps that hardly change anything (EasyCache, TeaCache), "
        "which changes the result",
    )
    threshold: float | None = _key(
        None,
        "how much may have changed before a step is computed again; null: easy 0.05, tea as published",
    )

    def __post_init__(self) -> None:
        check_positive("cache.size_gib", self.size_gib, "GiB", "; cache.dir=null keeps nothing")
        if self.steps is not None:
            check_choice("cache.steps", self.steps, STEP_CACHES)
        check_positive(
            "cache.threshold",
            self.threshold,
            hint=", e.g. 0.05; cache.steps=null computes every step",
        )

    def resolve_folder(self) -> Path | None:
        """Return the folder of cached prompt embeddings, None if none are cached."""
        if self.dir is None:
            return None
        if self.dir == "auto":
            cache_folder = find_user_cache()
            return None if cache_folder is None else cache_folder / "prompts"
        return Path(self.dir).expanduser()


@dataclass(kw_only=True)
class OutputConfig:
    """Where the results go."""

    dir: str = _key("outputs", "folder of the results; made if missing")
    events: str | None = _key(
        None,
        "a file that gets a line of JSON for each event of a run with jobs; - is standard output",
    )
    name: str | None = _key(None, "file name without suffix; null: from task, prompt and seed")
    save_latents: bool = _key(True, "keep the denoised latents beside the video")
    save_tensor: bool = _key(
        False, "also save the frames as safetensors: video, float32 (3, F, H, W) in [-1, 1]"
    )

    def __post_init__(self) -> None:
        if self.name is not None:
            check_file_name("output.name", self.name)


@dataclass(kw_only=True)
class RunConfig:
    """Settings of a run. ``null`` means: the task's default, or chosen by the program."""

    task: str = _key(MISSING, "what to generate (required)")
    ckpt_dir: str | None = _key(
        None,
        "checkpoint folder; null: the task's repository from the Hugging Face cache, or downloaded",
    )
    dit_file: str | None = _key(
        None,
        "the transformer's weights in one file, also fp8, instead of ckpt_dir's; two experts: HIGH,LOW",
    )
    prompt: str | None = _key(
        None, "what to show, as plain text; prompt=@file.txt reads a file, @@ is a plain @"
    )
    negative_prompt: str | None = _key(
        None, "what to keep away from; null: the task's; @file.txt works too"
    )
    image: str | None = _key(None, "image to start from")
    first_frame: str | None = _key(None, "image to start from, of two")
    last_frame: str | None = _key(
        None, "image to end with; scaled and cut to the first one's shape"
    )
    size: str = _key(
        MISSING,
        "width*height in pixels, as 832*480 or 832x480; "
        "with an image an area, which keeps the image's aspect",
    )
    max_area: int | None = _key(None, "area in pixels, instead of size where there is an image")
    frame_num: int = _key(MISSING, "frames, 4n + 1")
    fps: int = _key(MISSING, "frames a second of the video file")
    seed: int = _key(42, "seed of the noise; -1 draws one and prints it")
    noise_device: str = _key(
        "cpu",
        "where the noise is drawn: cpu (the same everywhere) or cuda (the reference's on a GPU)",
    )
    device: str = _key("auto", "auto, cuda or cpu")
    dtype: str = _key("bfloat16", "bfloat16, or float32 for comparisons")
    quant: str = _key(
        "none",
        "none, fp8, int8 or int4: the transformer's linears in fewer bits, "
        "but for the first and last block's",
    )
    attention: str = _key(
        "auto",
        "auto, fa4, fa3 or fa2 (FlashAttention), cudnn, flash or sdpa (PyTorch), "
        "sdpa16 (in float16), 8bit or sage (in 8 bits)",
    )
    latents: str | None = _key(None, "make the video from these kept latents instead of denoising")
    jobs: str | None = _key(
        None,
        "a file of videos to make: a prompt a line, or .jsonl, .json, .csv or .tsv with any of these keys",
    )
    retry_failed: bool = _key(False, "make the jobs again that have failed before")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        self._check_text_settings()
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quant", self.quant, QUANTIZATIONS)
        check_choice("attention", self.attention, ATTENTION_BACKENDS)
        check_choice("device", self.device, DEVICES)
        check_choice("noise_device", self.noise_device, NOISE_DEVICES)
        self.parse_size()
        if self.fps < 1:
            raise InputError(f"fps={self.fps}: at least 1 frame a second is needed")
        if self.fps > _MAX_FPS:
            raise InputError(f"fps={self.fps}: players show {_MAX_FPS} frames a second at most")
        if self.seed < -1:
            raise InputError(f"seed={self.seed}: use a number from 0 on, or -1 to have one drawn")
        if self.seed >= 2**64:
            raise InputError(f"seed={self.seed}: the largest is 2^64 - 1")
        if self.max_area is not None and self.max_area < 1:
            raise InputError(f"max_area={self.max_area}: it must be above 0, in pixels")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError(
                'the prompt is empty; say what to show, e.g. prompt="two cats boxing on a stage"'
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
            raise InputError(f"size={self.size} is not width*height, e.g. size=832*480")
        return int(match[1]), int(match[2])


@cache
def _list_text_getters() -> dict[str, Callable[[RunConfig], str | None]]:
    return {
        key: attrgetter(key)
        for key, setting in list_settings().items()
        if setting.type in (str, str | None)
    }


@cache
def list_settings(schema: type = RunConfig, prefix: str = "") -> dict[str, Field[Any]]:
    """Return every settable key of a schema, dotted, with its dataclass field."""
    settings: dict[str, Field[Any]] = {}
    for config_field in fields(schema):
        if isinstance(config_field.type, type) and is_dataclass(config_field.type):
            settings |= list_settings(config_field.type, f"{prefix}{config_field.name}.")
        else:
            settings[prefix + config_field.name] = config_field
    return settings


def register_schema() -> None:
    """Register the schema with Hydra, as the base of ``conf/config.yaml``."""
    ConfigStore.instance().store(name="base_config", node=RunConfig)
