"""Run plan from configuration and task: derived numbers, errors that cross fields; no torch."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

from wan_dist.config.loras import check_experts
from wan_dist.config.model_settings import collect_model_settings
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import OUTPUTS
from wan_dist.config.video_settings import collect_video_settings
from wan_dist.config.weight_files import list_model_files, list_weight_files
from wan_dist.models.dims import ModelDims
from wan_dist.planning.base_arrangement import build_base_arrangement, check_placements
from wan_dist.planning.degrees import (
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
    shorten_workload_frames,
)
from wan_dist.planning.lora_memory import estimate_merging_bytes
from wan_dist.planning.memory_estimate import StageMemory, estimate_memory
from wan_dist.planning.memory_planner import (
    Budget,
    choose_arrangement,
    choose_vae_strategies,
    compute_budget,
)
from wan_dist.planning.sampling_plan import plan_sampling
from wan_dist.planning.still_output import check_still_output
from wan_dist.planning.texts import (
    estimate_text_tokens,
    read_driving_prompt,
    read_negative_prompt,
    read_prompt,
)
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.planning.video_settings import (
    check_models_take_inputs,
    choose_tea_fit,
    read_video_input,
)
from wan_dist.planning.workload import Arrangement, CompressedBlocks, Workload
from wan_dist.runtime.environment import read_rank_layout
from wan_dist.tasks.image_sizes import ImageSizeReader
from wan_dist.tasks.input_files import list_input_files
from wan_dist.tasks.registry import get_task


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
    check_still_output(config.output, task)
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
    num_context_latents = 0 if video.speech is None else video.speech.max_context_latents
    num_tokens = count_latent_tokens(latent_shape, task.transformer_dims, num_context_latents)
    check_attention_split(degrees, num_tokens, config.attention, config.dtype, config.parallel.usp)
    model_files = list_model_files(config) if task.repository else None
    check_placements(config.memory, config.quant, degrees, is_guided=is_guided)
    base_arrangement = build_base_arrangement(
        config.memory, config.fsdp, task, degrees, latent_side=max(latent_shape[2:])
    )
    return VideoPlan(
        task=task,
        prompt=prompt or "",
        negative_prompt=read_negative_prompt(config.negative_prompt) if is_guided else None,
        images=video.images,
        num_images=max(video.num_images, 1 if config.clips > 1 else 0),
        source=video.source,
        image_keys=video.image_keys,
        camera=video.camera,
        input_notes=video.notes,
        driving=video.driving,
        speech=video.speech,
        driving_prompt=read_driving_prompt(config.prompt_ref, video.driving),
        width=video.width,
        height=video.height,
        size_note=video.size_note,
        frame_num=video.frame_num,
        num_clips=clips.num_clips if (clips := video.driving or video.speech) else config.clips,
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
    shorten_workload = partial(shorten_workload_frames, workload)
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
    num_context_latents = 0 if plan.speech is None else plan.speech.max_context_latents
    settings = plan.model_settings
    vae_dtype = settings.memory.vae_dtype or (settings.dtype if is_on_gpu else "float32")
    return Workload(
        model_dims=models,
        latent_shape=plan.latent_shape,
        num_tokens=count_latent_tokens(plan.latent_shape, models.transformer, num_context_latents),
        num_context_latents=num_context_latents,
        num_audio_samples=0 if plan.speech is None else plan.speech.num_samples,
        num_sound_frames=0 if plan.speech is None else plan.speech.num_made_frames,
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
