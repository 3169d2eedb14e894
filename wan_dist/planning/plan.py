"""Run plan from configuration and task: derived numbers, errors that cross fields; no torch."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

from PIL import Image

from wan_dist.config.loras import check_experts
from wan_dist.config.model_settings import ModelSettings, collect_model_settings
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import OUTPUTS
from wan_dist.config.video_settings import collect_video_settings
from wan_dist.config.weight_files import list_model_files, list_weight_files
from wan_dist.models.dims import ModelDims
from wan_dist.planning.base_arrangement import build_base_arrangement, check_placements
from wan_dist.planning.degrees import (
    Degrees,
    check_attention_split,
    choose_degrees,
    read_num_heads,
)
from wan_dist.planning.few_steps import advise_on_steps
from wan_dist.planning.file_names import name_result
from wan_dist.planning.gguf_memory import describe_weights, read_compressed_blocks
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.latent_shape import (
    compute_latent_shape,
    count_driving_tokens,
    count_latent_tokens,
)
from wan_dist.planning.lora_memory import estimate_merging_bytes
from wan_dist.planning.memory_estimate import StageMemory, estimate_memory
from wan_dist.planning.memory_planner import (
    Budget,
    choose_arrangement,
    choose_vae_strategies,
    compute_budget,
)
from wan_dist.planning.sampling_plan import SamplingPlan, plan_sampling
from wan_dist.planning.video_settings import (
    check_models_take_inputs,
    choose_tea_fit,
    estimate_text_tokens,
    read_driving_prompt,
    read_prompt,
    read_text_setting,
    read_video_input,
)
from wan_dist.planning.workload import Arrangement, CompressedBlocks, Workload
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.tasks.animate import DrivingVideo
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.tasks.base import Task, TeaCacheFit
from wan_dist.tasks.camera import CameraPath
from wan_dist.tasks.image_sizes import ImageSizeReader
from wan_dist.tasks.input_files import list_input_files
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.source_video import SourceVideo


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """What a run will do, in numbers, as far as it does not depend on memory."""

    task: Task
    prompt: str
    negative_prompt: str | None
    """None where guidance is off."""
    images: tuple[Image.Image, ...]
    """The images to start from: none, the first frame, or first and last, in 8-bit RGB.

    Those of a job that is only checked are not read.
    """
    num_images: int
    source: SourceVideo | None
    """Frames of a source video, and of its mask, that the video is made from."""
    image_keys: tuple[str, ...]
    """Settings that name the images, where these have roles of their own."""
    camera: CameraPath | None
    input_notes: tuple[str, ...]
    """What is done with the inputs, a line each."""
    driving: DrivingVideo | FollowedVideo | None
    """Video of a person whom the character follows, frame by frame."""
    driving_prompt: str | None
    """Description of a driving video that passes through the transformer."""
    width: int
    height: int
    size_note: str
    """How the size came about, where that is not plain."""
    frame_num: int
    """Frames of a clip."""
    num_clips: int
    clip_index: int = 0
    """The clip that this plan is of, from 0."""
    fps: int
    seed: int
    """Seed of the first clip's noise."""
    sampling: SamplingPlan
    steps_advice: str | None
    """A warning about the number of steps, or guidance, for the model at hand."""
    tea_fit: TeaCacheFit | None
    """TeaCache's, if it is requested."""
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w), with the reference images."""
    num_tokens: int
    degrees: Degrees
    ranks_per_node: int
    base_arrangement: Arrangement
    """What does not depend on memory: sharding, and the VAE's first strategy."""
    model_settings: ModelSettings
    has_saved_latents: bool
    """Latents of an earlier run are decoded, so that nothing but the VAE is needed."""
    name: str
    """File name of the results, without suffix."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that are embedded: the prompt first, then the negative one, the driving video's."""
        other_texts = (self.negative_prompt, self.driving_prompt)
        return self.prompt, *(text for text in other_texts if text is not None)

    @property
    def num_frames(self) -> int:
        """Frames of the video: those that a clip repeats of the one before it are left out."""
        num_frames = self.num_clips * (self.frame_num - 1) + 1
        return num_frames if self.driving is None else self.driving.num_frames

    @property
    def num_repeated_frames(self) -> int:
        """Frames that a clip after the first starts from, the last ones of the clip before it."""
        return 1 if self.driving is None else self.driving.num_repeated

    @property
    def num_reference_frames(self) -> int:
        """Latent frames of reference images, which precede those of the video and are not decoded."""
        return self.num_images if self.task.inputs.has_reference_frames else 0

    @property
    def num_video_latents(self) -> int:
        """Latent frames of the video, without reference images."""
        return self.latent_shape[1] - self.num_reference_frames

    @property
    def has_encoded_input(self) -> bool:
        """Whether the VAE encodes an input of the transformer."""
        return self.num_images > 0 or self.task.inputs.is_always_encoded

    @property
    def first_frame_index(self) -> int:
        """Index in the video of the clip's first frame, which the clip before has too."""
        start = self.clip_index * (self.frame_num - 1)
        return start if self.driving is None else self.driving.find_start(self.clip_index)

    @property
    def new_frames(self) -> slice:
        """Frames of the clip that the video has from it: not those of the clip before, or beyond the end."""
        num_known = self.num_repeated_frames if self.clip_index else 0
        return slice(num_known, self.num_frames - self.first_frame_index)

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the result in the frames that are made."""
        whole = (0, 0, self.width, self.height)
        return self.driving.crop if isinstance(self.driving, FollowedVideo) else whole

    @property
    def is_last_clip(self) -> bool:
        """Whether the video ends with this clip."""
        return self.clip_index == self.num_clips - 1

    @property
    def size_advice(self) -> str | None:
        """A warning for a size that the task was not published for, else None."""
        published_areas = {width * height for width, height in self.task.published_sizes}
        if not self.task.published_sizes or (self.width, self.height) in self.task.published_sizes:
            return None
        has_own_aspect = (self.source or self.driving) is not None or (
            bool(self.images) and not self.num_reference_frames
        )
        if has_own_aspect and max(published_areas) >= self.width * self.height >= 0.9 * min(
            published_areas
        ):
            return None
        size_list = ", ".join(f"{width}x{height}" for width, height in self.task.published_sizes)
        return (
            f"{self.task.name} was published for the sizes {size_list}; "
            f"{self.width}x{self.height} works but may look worse"
        )

    @property
    def notes(self) -> list[str]:
        """Warnings about the settings, a line each."""
        return [*self.input_notes, *filter(None, (self.size_advice, self.steps_advice))]

    @property
    def summary(self) -> str:
        """The video or image that is made, in one line."""
        size_text = f"{self.width}x{self.height}{self.size_note}"
        if self.task.is_still:
            return f"{self.task.name}: an image of {size_text}, seed {self.seed}"
        seconds = self.num_frames / self.fps
        clips_text = f" in {self.num_clips} clips" if self.num_clips > 1 else ""
        return (
            f"{self.task.name}: {self.num_frames} frames of {size_text} at {self.fps} fps "
            f"= {seconds:.1f} s of video{clips_text}, seed {self.seed}, {self.num_tokens} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class RunPlan(VideoPlan):
    """A video's plan with the arrangement of the models that fits into memory; see `plan_memory`."""

    workload: Workload
    """Sizes of what the run computes."""
    arrangement: Arrangement
    budget: Budget
    """Memory that the run may take."""
    stage_memories: tuple[StageMemory, ...]
    """Predicted memory of each stage."""

    @property
    def gguf_note(self) -> str:
        """How a GGUF file's weights are kept and why, empty for other files."""
        return describe_weights(self.workload, self.arrangement, self.model_settings.memory.gguf)


def make_plan(
    config: RunConfig,
    *,
    ranks: tuple[int, int] | None = None,
    is_dry_run: bool = False,
    is_job: bool = False,
    image_size_reader: ImageSizeReader | None = None,
) -> VideoPlan:
    """Return the plan of a run: what the configuration leaves open is resolved.

    ``ranks``: how many there are, and how many on a node; None: those that torchrun has started. A dry run
    does without prompt and images. A job is one of several videos, so there may be replicas. With
    ``image_size_reader``, such as `read_image_size`, images are not decoded. Raises InputError, with what
    would work, if the fields do not fit together.
    """
    task = get_task(config.task)
    model_settings = collect_model_settings(config)
    check_experts(model_settings.loras, has_experts=task.expert_boundary is not None)
    settings = read_settings(config, OUTPUTS)
    video_settings = collect_video_settings(config, list_input_files(settings))
    video = read_video_input(video_settings, task, image_size_reader, is_dry_run=is_dry_run)
    prompt = read_prompt(config.prompt, is_required=config.latents is None and not is_dry_run)
    seed = random.SystemRandom().randrange(2**32) if config.seed == -1 else config.seed
    sampling = plan_sampling(config.sample, task, config.max_area or video.area)
    is_guided = sampling.is_guided
    ranks = ranks or read_started_ranks()
    num_heads = read_num_heads(task, config.ckpt_dir, list_weight_files(config).get("dit_file", []))
    degrees = choose_degrees(config.parallel, ranks, num_heads, is_guided=is_guided, is_job=is_job)
    latent_shape = compute_latent_shape(video, task)
    num_tokens = count_latent_tokens(latent_shape, task.transformer_dims)
    check_attention_split(degrees, num_tokens, config.attention, config.dtype, config.parallel.usp)
    model_files = list_model_files(config) if task.repository else None
    check_placements(config.memory, config.quant, degrees, is_guided=is_guided)
    base_arrangement = build_base_arrangement(
        config.memory, config.fsdp, task, degrees, latent_side=max(latent_shape[2:])
    )
    return VideoPlan(
        task=task,
        prompt=prompt or "",
        negative_prompt=read_text_setting("negative_prompt", config.negative_prompt) or ""
        if is_guided
        else None,
        images=video.images,
        num_images=max(video.num_images, 1 if config.clips > 1 else 0),
        source=video.source,
        image_keys=video.image_keys,
        camera=video.camera,
        input_notes=video.notes,
        driving=video.driving,
        driving_prompt=read_driving_prompt(config.prompt_ref, video.driving),
        width=video.width,
        height=video.height,
        size_note=video.size_note,
        frame_num=video.frame_num,
        num_clips=config.clips if video.driving is None else video.driving.num_clips,
        fps=config.fps,
        seed=seed,
        sampling=sampling,
        steps_advice=advise_on_steps(config.sample, sampling, model_files, config.preset),
        tea_fit=choose_tea_fit(config.cache, task, video.area),
        latent_shape=latent_shape,
        num_tokens=num_tokens,
        degrees=degrees,
        ranks_per_node=ranks[1],
        base_arrangement=base_arrangement,
        model_settings=model_settings,
        has_saved_latents=config.latents is not None,
        name=name_result(settings, prompt, seed),
    )


def read_started_ranks() -> tuple[int, int]:
    """Return how many ranks torchrun started, in all and on this node."""
    ranks = read_rank_layout()
    return ranks.num_ranks, ranks.ranks_per_node


def plan_memory(
    plan: VideoPlan,
    hardware: Hardware,
    models: ModelDims,
    count_tokens: Callable[[str], int] = estimate_text_tokens,
    compressed_blocks: CompressedBlocks | None = None,
) -> RunPlan:
    """Return the plan with the fastest arrangement of these models that fits, and the memory of each stage.

    ``compressed_blocks``: of a checkpoint's transformer in GGUF; None: of the files that settings name.
    Raises InputError if nothing fits, with what would, and for inputs that the models do not take.
    """
    check_models_take_inputs(plan.task, plan.image_keys, plan.driving, models)
    workload = _build_workload(plan, hardware, models, count_tokens)
    settings = plan.model_settings
    if settings.quant == "none":
        compressed_blocks = compressed_blocks or read_compressed_blocks(
            settings.transformer_files,
            models.transformer,
            workload.itemsize,
            has_loras=bool(settings.loras),
        )
        workload = replace(workload, compressed_blocks=compressed_blocks)
    memory_settings = settings.memory
    budget = compute_budget(hardware, memory_settings, plan.degrees.num_ranks)
    shorten_workload = partial(_shorten_workload, workload)
    if plan.has_saved_latents:
        arrangement = choose_vae_strategies(
            workload, memory_settings, plan.base_arrangement, budget, shorten_workload
        )
        stages = [
            stage for stage in estimate_memory(workload, arrangement) if stage.name == "decode"
        ]
    else:
        arrangement = choose_arrangement(
            workload, memory_settings, plan.base_arrangement, budget, shorten_workload
        )
        stages = estimate_memory(workload, arrangement)
    return RunPlan(
        **{field.name: getattr(plan, field.name) for field in fields(VideoPlan)},
        workload=workload,
        arrangement=arrangement,
        budget=budget,
        stage_memories=tuple(stages),
    )


def _build_workload(
    plan: VideoPlan,
    hardware: Hardware,
    models: ModelDims,
    count_tokens: Callable[[str], int],
) -> Workload:
    """Return the workload of one replica: sizes and settings that memory depends on."""
    texts = [text for text in (plan.prompt, plan.negative_prompt) if text is not None]
    is_on_gpu = hardware.gpu_bytes is not None
    settings = plan.model_settings
    vae_dtype = settings.memory.vae_dtype or (settings.dtype if is_on_gpu else "float32")
    return Workload(
        model_dims=models,
        latent_shape=plan.latent_shape,
        num_tokens=count_latent_tokens(plan.latent_shape, models.transformer),
        text_lengths=tuple(count_tokens(text) for text in texts),
        num_images=plan.task.inputs.count_image_features(plan.num_images),
        num_reference_frames=plan.num_reference_frames,
        driving_tokens=count_driving_tokens(plan.driving, plan.latent_shape, plan.task),
        has_encoded_input=plan.has_encoded_input,
        has_known_first_frame=plan.task.inputs.kind == "known_first_frame",
        num_experts=1 if plan.task.expert_boundary is None else 2,
        has_step_cache=plan.tea_fit is not None,
        num_ranks=plan.degrees.ranks_per_replica,
        cfg_degree=plan.degrees.cfg,
        num_sequence_parts=plan.degrees.ring * plan.degrees.ulysses,
        ranks_per_node=plan.ranks_per_node,
        quant=settings.quant,
        is_on_gpu=is_on_gpu,
        has_8bit_attention=settings.attention == "8bit",
        itemsize=2 if settings.dtype == "bfloat16" else 4,
        vae_itemsize=2 if vae_dtype == "bfloat16" else 4,
        merging_bytes=estimate_merging_bytes(settings.loras),
    )


def _shorten_workload(workload: Workload, num_fewer_frames: int) -> Workload | None:
    """Return the workload with ``num_fewer_frames`` latent frames fewer, None if none would be left."""
    channels, num_frames, rows, columns = workload.latent_shape
    if num_fewer_frames >= num_frames - workload.num_reference_frames:
        return None
    latent_shape = (channels, num_frames - num_fewer_frames, rows, columns)
    return replace(
        workload,
        latent_shape=latent_shape,
        num_tokens=count_latent_tokens(latent_shape, workload.model_dims.transformer),
    )
