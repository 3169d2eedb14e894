"""RunConfig + task -> Plan: every derived number and every error that crosses fields. No torch, so that it answers at once."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from wan_dist.config.schema import RunConfig
from wan_dist.models.dims import ModelDims
from wan_dist.planning.degrees import MIN_STRIP_PIXELS, Degrees, check_attention_split, plan_degrees
from wan_dist.planning.file_names import name_result
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_estimate import StageMemory, estimate_memory
from wan_dist.planning.memory_planner import (
    Budget,
    choose_arrangement,
    choose_vae_strategies,
    compute_budget,
)
from wan_dist.planning.saved_latents import read_latents_size
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.planning.video_settings import (
    check_frame_num,
    check_size,
    choose_shift,
    choose_tea_fit,
    choose_video_size,
    get_guide_scales,
    read_images,
    read_or_blank_images,
    read_text_setting,
)
from wan_dist.planning.workload import Arrangement, Workload
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import read_checkpoint_json
from wan_dist.tasks.image_sizes import ImageSizeReader, find_image_files, read_image_sizes
from wan_dist.tasks.registry import Task, TeaCacheFit, get_task


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, in numbers."""

    task: Task
    prompt: str
    negative_prompt: str | None
    """None where guidance is off."""
    images: tuple[Image.Image, ...]
    """The images to start from: none, the first frame, or first and last, in 8-bit RGB. Of a job that is only checked they are not read."""
    num_images: int
    width: int
    height: int
    size_note: str
    """How the size came about, where that is not plain."""
    frame_num: int
    fps: int
    seed: int
    shift: float
    guide_scales: tuple[float, float]
    """For low and for high noise."""
    tea_fit: TeaCacheFit | None = None
    """TeaCache's, if it is asked for."""
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w)."""
    num_tokens: int
    degrees: Degrees
    ranks_per_node: int
    arrangement: Arrangement
    """Before `arranged`: what does not depend on memory, whether weights are sharded and the VAE's first way."""
    stage_memories: tuple[StageMemory, ...] = ()
    """What each stage is predicted to take; empty before `arranged`."""
    workload: Workload | None = None
    """What the run works on; None before `arranged`."""
    budget: Budget | None = None
    name: str
    """File name of the results, without suffix."""

    @property
    def size_advice(self) -> str | None:
        """What the user should know before it starts, if anything."""
        published_areas = {width * height for width, height in self.task.published_sizes}
        if not self.task.published_sizes or (self.width, self.height) in self.task.published_sizes:
            return None
        if self.images and max(published_areas) >= self.width * self.height >= 0.9 * min(
            published_areas
        ):
            return None
        size_list = ", ".join(f"{width}*{height}" for width, height in self.task.published_sizes)
        return f"{self.task.name} was published for the sizes {size_list}; {self.width}*{self.height} works but may look worse"

    @property
    def summary(self) -> str:
        """The result in one line."""
        size_text = f"{self.width}x{self.height}{self.size_note}"
        if self.task.is_still:
            return f"{self.task.name}: an image of {size_text}, seed {self.seed}"
        seconds = self.frame_num / self.fps
        return (
            f"{self.task.name}: {self.frame_num} frames of {size_text} at {self.fps} fps = {seconds:.1f} s of video, "
            f"seed {self.seed}, {self.num_tokens} tokens"
        )


def make_plan(
    config: RunConfig,
    *,
    ranks: tuple[int, int] | None = None,
    is_dry_run: bool = False,
    is_job: bool = False,
    image_size_reader: ImageSizeReader | None = None,
) -> Plan:
    """Resolve what the configuration leaves open; raises InputError with what would work if the fields do not fit together.

    ``ranks``: how many there are, and on a node; None: those that torchrun has started. A rehearsal does without prompt and images. A
    job is one of several videos, so there may be replicas. With ``size_of_image``, such as `image_size`, images are not decoded.
    """
    task = get_task(config.task)
    images: tuple[Image.Image, ...] = ()
    source_sizes: list[tuple[int, int]] = []
    size_note, frame_num = "", config.frame_num
    if config.latents is not None:
        width, height, frame_num = read_latents_size(config.latents, task)
    else:
        if image_size_reader is None:
            images = read_or_blank_images(config, task) if is_dry_run else read_images(config, task)
        source_sizes = (
            [image.size for image in images]
            if image_size_reader is None
            else read_image_sizes(find_image_files(config, task), image_size_reader)
        )
        width, height, size_note = choose_video_size(config, task, source_sizes)
    check_size(width, height, task)
    check_frame_num(frame_num, task)
    prompt = read_text_setting("prompt", config.prompt)
    if prompt is None and config.latents is None and not is_dry_run:
        raise InputError(
            'prompt is missing; say what to show, e.g. prompt="two cats boxing on a stage", or prompt=@file.txt'
        )
    seed = random.SystemRandom().randrange(2**32) if config.seed == -1 else config.seed
    guide_scales = get_guide_scales(config, task)
    num_ranks, ranks_per_node = ranks or read_started_ranks()
    degrees = _choose_degrees(
        config, task, num_ranks, ranks_per_node, is_guided=guide_scales != (1, 1)
    )
    if (dp := degrees.dp) > 1 and not is_job:
        raise InputError(
            f"parallel.dp={dp}: replicas are for several videos (jobs=FILE), and this run makes one; use parallel.dp=1"
        )
    latent_frames = (frame_num - 1) // task.vae_stride[0] + 1
    rows, columns = height // task.vae_stride[1], width // task.vae_stride[2]
    num_tokens = (
        (latent_frames // task.patch_size[0])
        * (rows // task.patch_size[1])
        * (columns // task.patch_size[2])
    )
    check_attention_split(degrees, num_tokens, config.attention, config.dtype, config.parallel.usp)
    negative_prompt = (
        None
        if guide_scales == (1, 1)
        else read_text_setting("negative_prompt", config.negative_prompt) or ""
    )
    return Plan(
        task=task,
        prompt=prompt or "",
        negative_prompt=negative_prompt,
        images=images,
        num_images=len(source_sizes),
        width=width,
        height=height,
        size_note=size_note,
        frame_num=frame_num,
        fps=config.fps,
        seed=seed,
        shift=choose_shift(
            config, task, width * height if config.max_area is None else config.max_area
        ),
        guide_scales=guide_scales,
        tea_fit=choose_tea_fit(config, task, width * height),
        latent_shape=(task.latent_channels, latent_frames, rows, columns),
        num_tokens=num_tokens,
        degrees=degrees,
        ranks_per_node=ranks_per_node,
        arrangement=_build_base_arrangement(
            config, task, degrees, max(rows, columns), is_guided=negative_prompt is not None
        ),
        name=name_result(config, prompt, seed),
    )


def read_started_ranks() -> tuple[int, int]:
    """Return how many ranks were started, and on this node."""
    ranks = read_rank_layout()
    return ranks.num_ranks, ranks.ranks_per_node


def _estimate_num_tokens(text: str) -> int:
    return min(512, len(text.encode()) // 3 + 2)


def plan_memory(
    plan: Plan,
    config: RunConfig,
    hardware: Hardware,
    models: ModelDims,
    count_tokens: Callable[[str], int] = _estimate_num_tokens,
) -> Plan:
    """Return the plan with the fastest arrangement of these models that fits, and what each stage would take.

    Raises InputError if nothing fits, with what would.
    """
    texts = [text for text in (plan.prompt, plan.negative_prompt) if text is not None]
    vae_dtype = config.memory.vae_dtype or (
        config.dtype if hardware.gpu_bytes is not None else "float32"
    )
    workload = Workload(
        model_dims=models,
        latent_shape=plan.latent_shape,
        num_tokens=plan.num_tokens,
        text_lengths=tuple(count_tokens(text) for text in texts),
        num_images=plan.num_images,
        has_fixed_first_frame=plan.task.has_fixed_first_frame,
        num_experts=1 if plan.task.expert_boundary is None else 2,
        has_step_cache=plan.tea_fit is not None,
        num_ranks=plan.degrees.ranks_per_replica,
        cfg_degree=plan.degrees.cfg,
        num_sequence_parts=plan.degrees.ring * plan.degrees.ulysses,
        ranks_per_node=plan.ranks_per_node,
        quant=config.quant,
        is_on_gpu=hardware.gpu_bytes is not None,
        has_8bit_attention=config.attention == "8bit",
        itemsize=2 if config.dtype == "bfloat16" else 4,
        vae_itemsize=2 if vae_dtype == "bfloat16" else 4,
    )
    budget = compute_budget(hardware, config.memory, plan.degrees.num_ranks)
    if config.latents is not None:  # nothing but the VAE is needed
        arrangement = choose_vae_strategies(
            workload,
            config.memory,
            plan.arrangement,
            budget,
            lambda number: _shorten_workload(workload, number),
        )
        stages = tuple(
            stage for stage in estimate_memory(workload, arrangement) if stage.name == "decode"
        )
        return replace(
            plan, arrangement=arrangement, stage_memories=stages, workload=workload, budget=budget
        )
    arrangement = choose_arrangement(
        workload,
        config.memory,
        plan.arrangement,
        budget,
        lambda number: _shorten_workload(workload, number),
    )
    return replace(
        plan,
        arrangement=arrangement,
        stage_memories=tuple(estimate_memory(workload, arrangement)),
        workload=workload,
        budget=budget,
    )


def _choose_degrees(
    config: RunConfig, task: Task, num_ranks: int, ranks_per_node: int, *, is_guided: bool
) -> Degrees:
    """Spread the ranks over the axes."""
    return plan_degrees(
        num_ranks,
        ranks_per_node=ranks_per_node,
        num_heads=read_num_heads(config),
        is_guided=is_guided,
        dp=config.parallel.dp,
        cfg=config.parallel.cfg,
        ring=config.parallel.ring,
        ulysses=config.parallel.ulysses,
    )


def read_num_heads(config: RunConfig) -> int:
    """Return the heads of the checkpoint that is used, where its config can be read, else those of the published one."""
    if config.ckpt_dir is not None:
        for subfolder in (".", "high_noise_model", "transformer"):
            try:
                model_config = read_checkpoint_json(
                    Path(config.ckpt_dir).expanduser() / subfolder / "config.json"
                )
                return int(model_config.get("num_heads") or model_config["num_attention_heads"])
            except (ValueError, KeyError, TypeError):
                continue  # whatever is wrong with the folder is said when it is opened
    return get_task(config.task).transformer_dims.num_heads


def _decide_sharding(
    model_key: str,
    requested: bool | None,
    placement: str | None,
    degrees: Degrees,
    *,
    default: bool,
) -> bool:
    is_elsewhere = placement not in (None, "resident", "gpu")
    if requested and is_elsewhere:
        raise InputError(
            f"fsdp.{model_key}=true keeps shards on the GPUs and memory.{model_key}={placement} does not; leave one of them out"
        )
    if requested and degrees.ranks_per_replica == 1:
        raise InputError(
            f"fsdp.{model_key}=true shards weights over several ranks, but there is one; leave it out, or start with torchrun"
        )
    return (
        degrees.ranks_per_replica > 1
        and not is_elsewhere
        and (default if requested is None else requested)
    )


def _build_base_arrangement(
    config: RunConfig, task: Task, degrees: Degrees, latent_side: int, *, is_guided: bool
) -> Arrangement:
    """Return what does not depend on memory: whether weights are sharded, and the VAE's first way."""
    if config.quant != "none" and config.memory.dit == "disk":
        raise InputError(
            f"quant={config.quant} and memory.dit=disk: the file's weights would be quantised anew each step; use memory.dit=stream"
        )
    passes = config.memory.passes
    if passes == "together" and (degrees.cfg == 2 or not is_guided):
        reason = (
            "they are on ranks of their own with parallel.cfg=2"
            if degrees.cfg == 2
            else "guidance is off, so there is one"
        )
        raise InputError(
            f"memory.passes={passes} is about the two passes of guidance, and {reason}; leave it out"
        )
    return Arrangement(
        shard_dit=_decide_sharding(
            "dit",
            config.fsdp.dit,
            config.memory.dit,
            degrees,
            default=task.transformer_dims.blocks_gib > 12,
        ),
        shard_t5=_decide_sharding("t5", config.fsdp.t5, config.memory.t5, degrees, default=False),
        vae=_choose_vae_strategy(config, degrees, latent_side),
    )


def _shorten_workload(workload: Workload, num_fewer_frames: int) -> Workload | None:
    """Return the load of a video with ``number`` latent frames less."""
    channels, num_frames, rows, columns = workload.latent_shape
    if num_fewer_frames >= num_frames:
        return None
    num_remaining_frames = num_frames - num_fewer_frames
    return replace(
        workload,
        latent_shape=(channels, num_remaining_frames, rows, columns),
        num_tokens=workload.num_tokens // num_frames * num_remaining_frames,
    )


def _choose_vae_strategy(config: RunConfig, degrees: Degrees, latent_side: int) -> VaeStrategy:
    """Return where the VAE works; its ranks share the latents' larger side, ``side``."""
    num_ranks = degrees.ranks_per_replica
    can_split = num_ranks > 1 and latent_side >= MIN_STRIP_PIXELS * num_ranks
    if config.memory.vae == "parallel" and not can_split:
        reason = (
            "there is one rank"
            if num_ranks == 1
            else f"{latent_side} latent pixels are too few for {num_ranks} ranks"
        )
        raise InputError(f"memory.vae=parallel: {reason}; memory.vae=whole works")
    return VaeStrategy(config.memory.vae or ("parallel" if can_split else "whole"))
