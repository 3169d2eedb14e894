"""Sections of the configuration: denoising, ranks, sharding, memory, caches, service."""

import ipaddress
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_dist.config.checks import check_choice, check_positive
from wan_dist.config.noise_levels import check_sigmas, check_timesteps
from wan_dist.config.paths import find_user_cache
from wan_dist.config.settings import ALL_EFFECTS, Effect
from wan_dist.config.settings import add_setting as _key
from wan_dist.runtime.errors import InputError

SOLVERS = ("unipc", "dpm++", "euler", "fun_euler", "lcm", "rcm", "rcm_ode")
DTYPES = ("bfloat16", "float32")
STEP_CACHES = ("easy", "tea")
USP_IMPLEMENTATIONS = ("plain", "xfuser")
VAE_STRATEGIES = ("parallel", "whole", "tiled", "cpu")
GGUF_WEIGHTS = ("decoded", "compressed")
DIT_PLACEMENTS = ("resident", "stream", "disk")
T5_PLACEMENTS = ("gpu", "stream", "cpu")
GUIDANCE_PASSES = ("together", "apart")
MAX_STEPS = 1000
_MAX_TIMEOUT_SECONDS = 365 * 86400
_MAX_PORT = 65535


@dataclass(kw_only=True)
class SampleConfig:
    """How the latents are denoised."""

    solver: str = _key(
        "unipc",
        "unipc, dpm++ or euler; fun_euler (euler with the Fun models' noise levels); for few-step "
        "models euler, lcm (new noise at each step, as DMD), rcm or rcm_ode",
        Effect.LATENTS,
    )
    steps: int = _key(50, "denoising steps", Effect.LATENTS)
    shift: float | None = _key(
        None,
        "shift of the noise schedule: larger spends more steps on strong noise; null: by the size",
        Effect.LATENTS,
    )
    sigmas: Any = _key(
        None,
        "noise levels of the steps, from 1 down, instead of steps and shift, e.g. [1.0,0.76,0.52]",
        Effect.LATENTS,
        is_new=True,
    )
    timesteps: Any = _key(
        None,
        "what the model is told of a noise level, 1000 times it: integer, float or bfloat16, or a "
        "list of numbers; null: as the solver's models were trained",
        Effect.LATENTS,
        is_new=True,
    )
    sigma_max: float | None = _key(
        None,
        "largest noise of rcm and rcm_ode, as a ratio to the video; null: 80, or 200 for i2v-A14B",
        Effect.LATENTS,
        is_new=True,
    )
    guide_scale: Any = _key(
        5.0,
        "scale of classifier-free guidance, or [low, high] noise for two experts; 1 turns it off",
        Effect.LATENTS,
    )

    def __post_init__(self) -> None:
        check_choice("sample.solver", self.solver, SOLVERS)
        check_sigmas(self.sigmas)
        check_timesteps(self.timesteps)
        if self.sigmas is not None:
            self.steps = len(self.sigmas)
        if self.steps < 1:
            raise InputError(f"sample.steps={self.steps} must be at least 1")
        if self.steps > MAX_STEPS:
            raise InputError(
                f"sample.steps={self.steps} must be at most {MAX_STEPS}, "
                "the number of noise levels that the models are trained on"
            )
        check_positive("sample.shift", self.shift, hint=" (published defaults are 3.0 to 16.0)")
        check_positive("sample.sigma_max", self.sigma_max, hint=" (published: 80 to 1600)")
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
            raise InputError(f"sample.guide_scale={self.guide_scale} must be finite, e.g. 5.0")
        return float(scales[0]), float(scales[1])


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks; the product of the degrees is the number of ranks."""

    dp: int | None = _key(None, "number of replicas, each with videos of its own; null: planned")
    cfg: int | None = _key(None, "2: the two guidance passes side by side; null: planned")
    ring: int | None = _key(
        None, "ring attention degree: ranks that pass keys and values around; null: planned"
    )
    ulysses: int | None = _key(
        None,
        "Ulysses degree: ranks that exchange tokens for heads, a divisor of the heads; "
        "null: planned",
    )
    usp: str = _key(
        "plain",
        "implementation of Ulysses and ring: plain (any number of tokens) or xfuser (a "
        "multiple of the ranks)",
    )
    timeout: float = _key(
        600.0,
        "seconds without a heartbeat, or in an exchange while denoising, after which a "
        "rank counts as lost",
    )
    load_timeout: float = _key(
        3600.0,
        "seconds that an exchange may take while texts are encoded and weights are "
        "read, also from a slow disk",
    )

    def __post_init__(self) -> None:
        check_choice("parallel.usp", self.usp, USP_IMPLEMENTATIONS)
        for key in ("timeout", "load_timeout"):
            check_positive(f"parallel.{key}", timeout_seconds := getattr(self, key), "seconds")
            if timeout_seconds > _MAX_TIMEOUT_SECONDS:
                raise InputError(
                    f"parallel.{key}={timeout_seconds} must be at most "
                    f"{_MAX_TIMEOUT_SECONDS} seconds, a year"
                )


@dataclass(kw_only=True)
class FsdpConfig:
    """Which weights are sharded over the ranks."""

    dit: bool | None = _key(
        None, "shard the transformer; null: if it is larger than 12 GiB", Effect.MODELS
    )
    t5: bool | None = _key(
        None,
        "shard the text encoder; null: no, it is on the first rank while it encodes",
        Effect.MODELS,
    )


@dataclass(kw_only=True)
class MemoryConfig:
    """How models and videos fit into memory."""

    dit: str | None = _key(
        None,
        "placement of the transformer's weights: resident, stream (from host memory) or "
        "disk (read each step); null: planned",
        Effect.MODELS,
    )
    gguf: str | None = _key(
        None,
        "weights of a transformer in GGUF: decoded as they are read, or compressed, in the file's "
        "blocks until each is used; same result; null: planned",
        Effect.MODELS,
        is_new=True,
    )
    t5: str | None = _key(
        None,
        "placement of the text encoder: gpu, stream (on the GPU, block by block from "
        "disk) or cpu; null: planned",
        Effect.MODELS,
    )
    slice_tokens: int | None = _key(
        None,
        "tokens that pass the transformer's linears at once; null: planned",
        Effect.MODELS,
    )
    passes: str | None = _key(
        None,
        "the two guidance passes through each block: together, or apart, for less "
        "memory; null: planned",
        Effect.MODELS,
    )
    vae: str | None = _key(
        None,
        "VAE strategy: parallel (a strip per rank), whole, tiled or cpu; null: parallel "
        "with several ranks",
        Effect.MODELS,
    )
    vae_dtype: str | None = _key(
        None,
        "dtype of the VAE, bfloat16 or float32; null: the run's dtype on a GPU, float32 on a CPU",
        ALL_EFFECTS,
    )
    budget_gib: float | None = _key(
        None, "limit of GPU memory per rank, in GiB; null: all of it", Effect.MODELS
    )
    host_budget_gib: float | None = _key(
        None,
        "limit of host memory for all ranks of a node, in GiB; null: what is free",
        Effect.MODELS,
    )

    def __post_init__(self) -> None:
        choices_by_key = {
            "dit": DIT_PLACEMENTS,
            "gguf": GGUF_WEIGHTS,
            "t5": T5_PLACEMENTS,
            "passes": GUIDANCE_PASSES,
            "vae": VAE_STRATEGIES,
            "vae_dtype": DTYPES,
        }
        for key, allowed_choices in choices_by_key.items():
            if (value := getattr(self, key)) is not None:
                check_choice(f"memory.{key}", value, allowed_choices)
        if self.slice_tokens is not None and self.slice_tokens < 1:
            raise InputError(f"memory.slice_tokens={self.slice_tokens} must be at least 1")
        for key in ("budget_gib", "host_budget_gib"):
            check_positive(f"memory.{key}", getattr(self, key), "GiB")


@dataclass(kw_only=True)
class CacheConfig:
    """Caches of earlier results.

    Prompt embeddings, so that a prompt seen before needs no text encoder, and velocities of steps.
    """

    dir: str | None = _key(
        "auto",
        "folder of cached prompt embeddings and encoded images; auto: wan-dist/prompts in the "
        "user's cache; null: no cache",
    )
    size_gib: float = _key(
        1.0, "limit of that folder's size, in GiB; the least recently used files are removed"
    )
    steps: str | None = _key(
        None,
        "step cache, easy or tea (EasyCache, TeaCache): skips steps that change little, "
        "which changes the result",
        Effect.LATENTS,
    )
    threshold: float | None = _key(
        None,
        "change after which the step cache computes a step again; null: easy 0.05, tea "
        "as published",
        Effect.LATENTS,
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
class ServeConfig:
    """A service that makes videos on request; see ``docs/service.md``."""

    port: int | None = _key(
        None,
        "port of the video API, which the run then serves instead of making one video; 0: a free one",
        is_new=True,
    )
    host: str = _key(
        "127.0.0.1",
        "address that the API listens on; any but a loopback address needs serve.token_file",
        is_new=True,
    )
    token_file: str | None = _key(
        None,
        "file with the token that requests must have, as Authorization: Bearer TOKEN",
        is_new=True,
    )
    max_queue: int = _key(
        100, "number of waiting requests from which further ones are refused (429)", is_new=True
    )
    max_upload_mib: float = _key(
        20.0, "limit of a request's size, with its images, in MiB", is_new=True
    )

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= _MAX_PORT:
            raise InputError(f"serve.port={self.port} must be 0 to {_MAX_PORT}")
        if self.max_queue < 1:
            raise InputError(f"serve.max_queue={self.max_queue} must be at least 1")
        check_positive("serve.max_upload_mib", self.max_upload_mib, "MiB")

    @property
    def is_loopback(self) -> bool:
        """Whether the API can be reached from this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check_access(self) -> None:
        """Raise InputError for an API that anybody could use."""
        if not self.is_loopback and self.token_file is None:
            raise InputError(
                f"serve.host={self.host} can be reached from other machines, and needs "
                "serve.token_file=FILE; serve.host=127.0.0.1 can not"
            )
