"""RunConfig + task -> Plan: every derived number and every error that crosses fields. No torch, so that it answers at once."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from wan_dist.config.schema import MOST_CHARACTERS, RunConfig
from wan_dist.models.dims import ModelDims
from wan_dist.planning.degrees import MIN_STRIP, Degrees, check_attention, plan_degrees
from wan_dist.planning.file_names import name_result
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_estimate import Use, footprint
from wan_dist.planning.memory_planner import Budget, arrange, arrange_vae, budget_of
from wan_dist.planning.saved_latents import LONGEST_SIDE, size_of_latents
from wan_dist.planning.vae_memory import Way
from wan_dist.planning.workload import Arrangement, Load
from wan_dist.runtime.environment import read_ranks
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableError, read_object, read_text
from wan_dist.tasks.image_sizes import SizeOfImage, image_files, image_sizes
from wan_dist.tasks.images import best_size_of_area, cover, read_image, size_of_area
from wan_dist.tasks.registry import AREA_480P, TASKS, Images, Task, TeaFit, get_task

_MOST_FRAMES = 10**6 + 1


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
    tea: TeaFit | None = None
    """TeaCache's, if it is asked for."""
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w)."""
    num_tokens: int
    degrees: Degrees
    ranks_per_node: int
    arrangement: Arrangement
    """Before `arranged`: what does not depend on memory, whether weights are sharded and the VAE's first way."""
    uses: tuple[Use, ...] = ()
    """What each stage is predicted to take; empty before `arranged`."""
    load: Load | None = None
    """What the run works on; None before `arranged`."""
    budget: Budget | None = None
    name: str
    """File name of the results, without suffix."""

    @property
    def advice(self) -> str | None:
        """What the user should know before it starts, if anything."""
        areas = {width * height for width, height in self.task.sizes}
        if not self.task.sizes or (self.width, self.height) in self.task.sizes:
            return None
        if self.images and max(areas) >= self.width * self.height >= 0.9 * min(areas):
            return None
        sizes = ", ".join(f"{width}*{height}" for width, height in self.task.sizes)
        return f"{self.task.name} was published for the sizes {sizes}; {self.width}*{self.height} works but may look worse"

    @property
    def summary(self) -> str:
        """The result in one line."""
        size = f"{self.width}x{self.height}{self.size_note}"
        if self.task.still:
            return f"{self.task.name}: an image of {size}, seed {self.seed}"
        seconds = self.frame_num / self.fps
        return (
            f"{self.task.name}: {self.frame_num} frames of {size} at {self.fps} fps = {seconds:.1f} s of video, "
            f"seed {self.seed}, {self.num_tokens} tokens"
        )


def make_plan(
    config: RunConfig,
    *,
    ranks: tuple[int, int] | None = None,
    is_rehearsal: bool = False,
    is_job: bool = False,
    size_of_image: SizeOfImage | None = None,
) -> Plan:
    """Resolve what the configuration leaves open; raises InputError with what would work if the fields do not fit together.

    ``ranks``: how many there are, and on a node; None: those that torchrun has started. A rehearsal does without prompt and images. A
    job is one of several videos, so there may be replicas. With ``size_of_image``, such as `image_size`, images are not decoded.
    """
    task = get_task(config.task)
    images: tuple[Image.Image, ...] = ()
    sizes: list[tuple[int, int]] = []
    size_note, frame_num = "", config.frame_num
    if config.latents is not None:
        width, height, frame_num = size_of_latents(config.latents, task)
    else:
        if size_of_image is None:
            images = _any_images(config, task) if is_rehearsal else _read_images(config, task)
        sizes = [image.size for image in images] if size_of_image is None else image_sizes(image_files(config, task), size_of_image)
        width, height, size_note = _video_size(config, task, sizes)
    _check_size(width, height, task)
    _check_frames(frame_num, task)
    prompt = _text("prompt", config.prompt)
    if prompt is None and config.latents is None and not is_rehearsal:
        raise InputError('prompt is missing; say what to show, e.g. prompt="two cats boxing on a stage", or prompt=@file.txt')
    seed = random.SystemRandom().randrange(2**32) if config.seed == -1 else config.seed
    guide_scales = _guide_scales(config, task)
    num_ranks, ranks_per_node = ranks or ranks_started()
    degrees = _degrees(config, task, num_ranks, ranks_per_node, guided=guide_scales != (1, 1))
    if (dp := degrees.dp) > 1 and not is_job:
        raise InputError(f"parallel.dp={dp}: replicas are for several videos (jobs=FILE), and this run makes one; use parallel.dp=1")
    latent_frames = (frame_num - 1) // task.stride[0] + 1
    rows, columns = height // task.stride[1], width // task.stride[2]
    num_tokens = (latent_frames // task.patch[0]) * (rows // task.patch[1]) * (columns // task.patch[2])
    check_attention(degrees, num_tokens, config.attention, config.dtype, config.parallel.usp)
    negative = None if guide_scales == (1, 1) else _text("negative_prompt", config.negative_prompt) or ""
    return Plan(
        task=task,
        prompt=prompt or "",
        negative_prompt=negative,
        images=images,
        num_images=len(sizes),
        width=width,
        height=height,
        size_note=size_note,
        frame_num=frame_num,
        fps=config.fps,
        seed=seed,
        shift=_shift(config, task, width * height if config.max_area is None else config.max_area),
        guide_scales=guide_scales,
        tea=_tea(config, task, width * height),
        latent_shape=(task.latent_channels, latent_frames, rows, columns),
        num_tokens=num_tokens,
        degrees=degrees,
        ranks_per_node=ranks_per_node,
        arrangement=_settled(config, task, degrees, max(rows, columns), guided=negative is not None),
        name=name_result(config, prompt, seed),
    )


def ranks_started() -> tuple[int, int]:
    """Return how many ranks were started, and on this node."""
    ranks = read_ranks()
    return ranks.num_ranks, ranks.ranks_per_node


def _about_as_many_tokens(text: str) -> int:
    return min(512, len(text.encode()) // 3 + 2)


def arranged(
    plan: Plan, config: RunConfig, hardware: Hardware, models: ModelDims, count_tokens: Callable[[str], int] = _about_as_many_tokens
) -> Plan:
    """Return the plan with the fastest arrangement of these models that fits, and what each stage would take.

    Raises InputError if nothing fits, with what would.
    """
    texts = [text for text in (plan.prompt, plan.negative_prompt) if text is not None]
    vae_dtype = config.memory.vae_dtype or (config.dtype if hardware.gpu_bytes is not None else "float32")
    load = Load(
        models=models,
        latent_shape=plan.latent_shape,
        num_tokens=plan.num_tokens,
        text_tokens=tuple(count_tokens(text) for text in texts),
        num_images=plan.num_images,
        is_first_frame=plan.task.known_first_frame,
        num_experts=1 if plan.task.boundary is None else 2,
        keeps_steps=plan.tea is not None,
        num_ranks=plan.degrees.ranks_of_replica,
        cfg=plan.degrees.cfg,
        num_parts=plan.degrees.ring * plan.degrees.ulysses,
        ranks_per_node=plan.ranks_per_node,
        quant=config.quant,
        on_gpu=hardware.gpu_bytes is not None,
        attends_in_8_bits=config.attention == "8bit",
        itemsize=2 if config.dtype == "bfloat16" else 4,
        vae_itemsize=2 if vae_dtype == "bfloat16" else 4,
    )
    budget = budget_of(hardware, config.memory, plan.degrees.num_ranks)
    if config.latents is not None:  # nothing but the VAE is needed
        arrangement = arrange_vae(load, config.memory, plan.arrangement, budget, lambda number: _shorter(load, number))
        uses = tuple(use for use in footprint(load, arrangement) if use.stage == "decode")
        return replace(plan, arrangement=arrangement, uses=uses, load=load, budget=budget)
    arrangement = arrange(load, config.memory, plan.arrangement, budget, lambda number: _shorter(load, number))
    return replace(plan, arrangement=arrangement, uses=tuple(footprint(load, arrangement)), load=load, budget=budget)


def _degrees(config: RunConfig, task: Task, num_ranks: int, ranks_per_node: int, *, guided: bool) -> Degrees:
    """Spread the ranks over the axes."""
    return plan_degrees(
        num_ranks,
        ranks_per_node=ranks_per_node,
        num_heads=heads_of(config),
        guided=guided,
        dp=config.parallel.dp,
        cfg=config.parallel.cfg,
        ring=config.parallel.ring,
        ulysses=config.parallel.ulysses,
    )


def heads_of(config: RunConfig) -> int:
    """Return the heads of the checkpoint that is used, where its config can be read, else those of the published one."""
    if config.ckpt_dir is not None:
        for place in (".", "high_noise_model", "transformer"):
            try:
                found = read_object(Path(config.ckpt_dir).expanduser() / place / "config.json")
                return int(found.get("num_heads") or found["num_attention_heads"])
            except (ValueError, KeyError, TypeError):
                continue  # whatever is wrong with the folder is said when it is opened
    return get_task(config.task).transformer.num_heads


def _shard(what: str, asked: bool | None, place: str | None, degrees: Degrees, *, default: bool) -> bool:
    is_elsewhere = place not in (None, "resident", "gpu")
    if asked and is_elsewhere:
        raise InputError(f"fsdp.{what}=true keeps shards on the GPUs and memory.{what}={place} does not; leave one of them out")
    if asked and degrees.ranks_of_replica == 1:
        raise InputError(f"fsdp.{what}=true shards weights over several ranks, but there is one; leave it out, or start with torchrun")
    return degrees.ranks_of_replica > 1 and not is_elsewhere and (default if asked is None else asked)


def _settled(config: RunConfig, task: Task, degrees: Degrees, side: int, *, guided: bool) -> Arrangement:
    """Return what does not depend on memory: whether weights are sharded, and the VAE's first way."""
    if config.quant != "none" and config.memory.dit == "disk":
        raise InputError(
            f"quant={config.quant} and memory.dit=disk: the file's weights would be quantised anew each step; use memory.dit=stream"
        )
    passes = config.memory.passes
    if passes == "together" and (degrees.cfg == 2 or not guided):
        why = "they are on ranks of their own with parallel.cfg=2" if degrees.cfg == 2 else "guidance is off, so there is one"
        raise InputError(f"memory.passes={passes} is about the two passes of guidance, and {why}; leave it out")
    return Arrangement(
        shard_dit=_shard("dit", config.fsdp.dit, config.memory.dit, degrees, default=task.transformer.gib > 12),
        shard_t5=_shard("t5", config.fsdp.t5, config.memory.t5, degrees, default=False),
        vae=_vae(config, degrees, side),
    )


def _shorter(load: Load, number: int) -> Load | None:
    """Return the load of a video with ``number`` latent frames less."""
    channels, frames, rows, columns = load.latent_shape
    if number >= frames:
        return None
    left = frames - number
    return replace(load, latent_shape=(channels, left, rows, columns), num_tokens=load.num_tokens // frames * left)


def _vae(config: RunConfig, degrees: Degrees, side: int) -> Way:
    """Return where the VAE works; its ranks share the latents' larger side, ``side``."""
    num_ranks = degrees.ranks_of_replica
    fits = num_ranks > 1 and side >= MIN_STRIP * num_ranks
    if config.memory.vae == "parallel" and not fits:
        why = "there is one rank" if num_ranks == 1 else f"{side} latent pixels are too few for {num_ranks} ranks"
        raise InputError(f"memory.vae=parallel: {why}; memory.vae=whole works")
    return Way(config.memory.vae or ("parallel" if fits else "whole"))


def _any_images(config: RunConfig, task: Task) -> tuple[Image.Image, ...]:
    """Return the images that were given, or as many blank ones of the video's size as the task must have."""
    given = any(getattr(config, key) is not None for key in ("image", "first_frame", "last_frame"))
    if given or task.images in (Images.NONE, Images.OPTIONAL):
        return _read_images(config, task)
    return tuple(Image.new("RGB", config.width_height()) for _ in task.images.keys)


def _read_images(config: RunConfig, task: Task) -> tuple[Image.Image, ...]:
    """Return the images the task starts from; raises InputError if one is missing, unreadable or not wanted."""
    images = tuple(read_image(file, key) for key, file in image_files(config, task).items())
    if len(images) == 2:
        images = (images[0], cover(images[1], images[0].size))
    return images


def _video_size(config: RunConfig, task: Task, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int, str]:
    """Return width, height and how they came about: with an image, the size is an area and the image gives the aspect."""
    width, height = config.width_height()
    if not image_sizes:
        if config.max_area is not None:
            raise InputError(f"max_area={config.max_area} is for tasks with an image; {task.name} without one takes size=width*height")
        return width, height, ""
    area = config.max_area or width * height
    fit = best_size_of_area if task.known_first_frame else size_of_area
    image_width, image_height = image_sizes[0]
    fitted = fit(image_width, image_height, area, task.multiple)
    asked = f"max_area={config.max_area}" if config.max_area else f"size={width}*{height}"
    note = "" if fitted == (width, height) else f" ({asked} is an area, the image of {image_width}x{image_height} gives the aspect)"
    return *fitted, note


def _guide_scales(config: RunConfig, task: Task) -> tuple[float, float]:
    scales = config.sample.guide_scales()
    if task.boundary is None and scales[0] != scales[1]:
        raise InputError(f"sample.guide_scale={config.sample.guide_scale}: {task.name} has one transformer and takes one number")
    return scales


def _shift(config: RunConfig, task: Task, area: int) -> float:
    if config.sample.shift is not None:
        return config.sample.shift
    if task.shifts is None:
        raise InputError(f"sample.shift is null, but {task.name} has no default by size; published defaults are 3.0 to 16.0")
    return task.shifts[0] if area <= AREA_480P else task.shifts[1]


def _tea(config: RunConfig, task: Task, area: int) -> TeaFit | None:
    if config.cache.steps != "tea":
        return None
    if not task.tea:
        names = ", ".join(name for name, other in TASKS.items() if other.tea)
        raise InputError(f"cache.steps=tea has been fitted to the models of {names}, not to that of {task.name}; cache.steps=easy works")
    fit = task.tea[0 if area <= AREA_480P else -1]
    return fit if config.cache.threshold is None else fit._replace(threshold=config.cache.threshold)


def _check_frames(frame_num: int, task: Task) -> None:
    if task.still and frame_num != 1:
        raise InputError(f"frame_num={frame_num}: {task.name} makes one image, frame_num=1")
    stride = task.stride[0]
    if frame_num < 1 or (frame_num - 1) % stride:
        below = max(frame_num - 1, 0) // stride * stride + 1
        raise InputError(f"frame_num={frame_num} is not {stride}n + 1; the nearest that work are {below} and {below + stride}")
    if frame_num > _MOST_FRAMES:
        raise InputError(f"frame_num={frame_num}: more than {_MOST_FRAMES} frames are not made in one video")
    if task.images is Images.FIRST_AND_LAST and frame_num == 1:
        raise InputError(f"frame_num=1: a first and a last frame need at least frame_num={stride + 1}")


def _check_size(width: int, height: int, task: Task) -> None:
    across, down = task.multiple
    if max(width, height) > LONGEST_SIDE:
        raise InputError(f"size={width}*{height}: H.264 has {LONGEST_SIDE} pixels a side at most")
    if width % across == 0 and height % down == 0:
        return
    smaller = f"{max(width // across, 1) * across}*{max(height // down, 1) * down}"
    larger = f"{-(-width // across) * across}*{-(-height // down) * down}"
    raise InputError(
        f"size={width}*{height}: the width must be a multiple of {across} and the height of {down}; "
        f"the nearest that work are {smaller} and {larger}"
    )


def _text(key: str, value: str | None) -> str | None:
    """Return the text, or the contents of the file after ``@``; ``@@`` begins a text with ``@``."""
    if value is None or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        path = Path(value[1:]).expanduser()
        text = read_text(path, most=MOST_CHARACTERS).strip()
    except UnreadableError as fault:
        raise InputError(f"{key}={value}: cannot read {path} ({fault}); a text that begins with @ is written with @@") from None
    except RuntimeError as fault:
        raise InputError(f"{key}={value}: {fault}") from None
    if not text and key == "prompt":
        raise InputError(f"{key}={value}: the file is empty")
    return text
