"""Velocity prediction by a run's transformers, each loaded at its first timestep."""

from collections import Counter
from dataclasses import dataclass, field
from weakref import ReferenceType

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.models.animate_2 import DRIVING_TIMESTEPS
from wan_dist.models.attention.driving import DrivingStream
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.vsa import choose_vsa_sparsity
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_transformer import FusedTransformer, list_time_layers
from wan_dist.models.gguf_linear import compress_blocks
from wan_dist.models.kernels.quantized_linear import quantize_blocks
from wan_dist.models.speech import ClipInputs, SpeechTransformer
from wan_dist.models.vace import VaceTransformer
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.cfg import ParallelGuidance
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.mesh import ProcessGroups, set_group_timeout
from wan_dist.parallel.shared_work import OutOfMemoryOnRankError
from wan_dist.pipeline.contexts import ProjectedContexts, project_contexts
from wan_dist.pipeline.driving import pass_driving_video
from wan_dist.pipeline.fallback_predictor import FallbackPredictor
from wan_dist.pipeline.out_of_memory import ensure_ranks_can_allocate, free_memory
from wan_dist.pipeline.session import Session
from wan_dist.planning.memory_estimate import estimate_step_bytes
from wan_dist.planning.memory_planner import list_fallbacks, replace_transformer_part
from wan_dist.planning.noise_schedule import NUM_TRAIN_TIMESTEPS
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.workload import Arrangement
from wan_dist.runtime.log import logger
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.guidance import ExpertSwitch, Guidance, VelocityPredictor, make_timestep_rows
from wan_dist.sampling.solvers import Solver
from wan_dist.sampling.step_cache import EasyCache, TeaCache, VelocityFunction
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.weights.gguf_parts import find_weight_parts
from wan_dist.weights.streaming import StreamingOptions


@dataclass(frozen=True)
class ExpertPredictor:
    """Loads the transformers of a run as predictions of the velocity; ``noise`` has the latents' shape."""

    session: Session
    config: RunConfig
    plan: RunPlan
    attention: InnerAttention
    report: StageReport
    conditioning: Conditioning
    noise: Tensor
    solver: Solver
    num_done: int = 0
    """Steps that the resumed run had completed."""
    step_cache_state: dict[str, Tensor] = field(default_factory=dict)
    """State of the resumed run's step cache; see `EasyCache.state`."""
    step_caches: list[ReferenceType[EasyCache]] = field(default_factory=list)
    """Step caches of the loaded transformers; weak, so as not to hold an evicted transformer."""
    driving_streams: list[DrivingStream] = field(default_factory=list)
    """Of the loaded transformers that keep a driving video's keys and values."""
    step_counts: Counter[str] = field(default_factory=Counter)
    """How many steps were ``guessed``."""

    @property
    def groups(self) -> ProcessGroups:
        """The session's process groups."""
        return self.session.groups

    def build_predictor(self) -> VelocityFunction:
        """Return the run's prediction: of one transformer, or the high-noise, then the low-noise expert."""
        low_scale, high_scale = self.plan.sampling.guide_scales
        if self.plan.task.expert_boundary is None:
            return self.open_expert(0, "", high_scale, len(self.solver), self.num_done)
        boundary = self.plan.task.expert_boundary * NUM_TRAIN_TIMESTEPS
        num_high_noise_steps = sum(timestep >= boundary for timestep in self.solver.timesteps)
        logger.info(
            "experts   high noise for the first %d steps, low noise for the other %d",
            num_high_noise_steps,
            len(self.solver) - num_high_noise_steps,
        )
        return ExpertSwitch(
            lambda: self.open_expert(0, " high", high_scale, num_high_noise_steps, self.num_done),
            lambda: self.open_expert(
                1,
                " low",
                low_scale,
                len(self.solver) - num_high_noise_steps,
                max(0, self.num_done - num_high_noise_steps),
            ),
            boundary=boundary,
            load_early=self.plan.arrangement.shard_dit,  # two shards are less than one whole expert
        )

    def open_expert(
        self,
        expert_index: int,
        stage_suffix: str,
        guide_scale: float,
        num_steps: int,
        num_done: int,
    ) -> VelocityFunction:
        """Load a transformer as planned, for ``num_steps`` steps of which ``num_done`` are completed.

        ``stage_suffix`` is appended to its stages' names. Where a GPU runs out of memory, the transformer
        is loaded, or the step is repeated, with an arrangement that needs less. Several ranks allocate the
        memory on trial before the first step instead: one that ran out in the middle of it would leave the
        others waiting.
        """
        can_split_passes = guide_scale != 1 and self.conditioning.negative_context is not None
        # An error on only one of several ranks ends the run.
        error_type = (
            torch.OutOfMemoryError if self.groups.replica.size == 1 else OutOfMemoryOnRankError
        )
        fallback_predictor = FallbackPredictor(
            lambda arrangement: self._open_with_arrangement(
                expert_index,
                stage_suffix,
                guide_scale,
                num_done,
                arrangement,
                num_rounds=(num_steps - num_done)
                * (2 if can_split_passes and arrangement.passes == "apart" else 1)
                + isinstance(self.plan.driving, FollowedVideo),
            ),
            self._list_arrangements(can_split_passes=can_split_passes),
            can_split_passes=can_split_passes,
            error_type=error_type,
            on_fallback=self._record_fallback,
        )
        if self.config.cache.steps != "easy":
            return fallback_predictor
        threshold = self.config.cache.threshold or 0.05
        easy_cache = EasyCache(
            fallback_predictor,
            num_steps=num_steps,
            num_done=num_done,
            threshold=threshold,
            agree=self._broadcast_decision,
            on_guess=self._count_guessed_step,
        )
        if num_done and self.step_cache_state:
            easy_cache.restore(self.step_cache_state)
        self.step_caches.append(ReferenceType(easy_cache))
        return easy_cache

    def _list_arrangements(self, *, can_split_passes: bool) -> list[Arrangement]:
        """Return the arrangements to try, in order.

        They start at the planned one, or at the session's current fallback.
        """
        planned, session_fallback = self.plan.arrangement, self.session.fallback_arrangement
        arrangements = [
            planned,
            *list_fallbacks(planned, self.config.memory, can_split_passes=can_split_passes),
        ]
        if session_fallback is None:
            return arrangements
        current = replace_transformer_part(planned, session_fallback)
        # The previous video found that earlier arrangements need too much memory.
        return (
            arrangements[arrangements.index(current) :] if current in arrangements else arrangements
        )

    def _record_fallback(self, arrangement: Arrangement) -> None:
        self.session.apply_fallback(arrangement, self.report)

    def forget_driving_video(self) -> None:
        """Free what a driving video's pass has kept: loaded transformers may stay for other videos."""
        for stream in self.driving_streams:
            stream.kept.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the state of the step cache in use, for resuming."""
        caches = [
            cache for reference in reversed(self.step_caches) if (cache := reference()) is not None
        ]
        return next((state for cache in caches if (state := cache.state())), {})

    def _open_with_arrangement(
        self,
        expert_index: int,
        stage_suffix: str,
        guide_scale: float,
        num_done: int,
        arrangement: Arrangement,
        *,
        num_rounds: int,
    ) -> VelocityFunction:
        """Load a transformer with one arrangement, and return its guided prediction.

        All blocks are called ``num_rounds`` times at most.
        """
        groups = self.groups
        set_group_timeout(groups, self.config.parallel.load_timeout)
        if not self.session.model_cache.is_persistent:
            free_memory()  # of the previous transformer
        model, contexts = self._load_model_and_contexts(
            expert_index, stage_suffix, arrangement, num_rounds
        )
        model.set_slice_tokens(arrangement.slice_tokens)
        if model.dims.has_sla:
            model.set_sla_key_share(self.config.sla_topk)
        if model.dims.has_vsa:
            model.set_vsa_sparsity(choose_vsa_sparsity(self.config.vsa_sparsity, model.dims))
        if isinstance(model, VaceTransformer):
            model.context_scale = self.config.context_scale
        if model.driving is not None:
            self.driving_streams.append(model.driving)
        bias = self.config.first_frame_bias
        pass_driving_video(model, self.plan, self.conditioning, contexts, self.report, bias)
        if groups.replica.size > 1:
            ensure_ranks_can_allocate(
                estimate_step_bytes(self.plan.workload, arrangement),
                self.report.device,
                groups.replica,
            )
        set_group_timeout(groups, self.config.parallel.timeout)
        return self._build_guidance(model, contexts, guide_scale, num_done, arrangement)

    def _load_model_and_contexts(
        self, expert_index: int, stage_suffix: str, arrangement: Arrangement, num_rounds: int
    ) -> tuple[FusedTransformer, ProjectedContexts]:
        """Return a transformer, and what it takes beside latents and timesteps."""
        model_cache = self.session.model_cache
        slot = self.session.get_cache_slot("transformer", expert_index)
        variant = (expert_index, arrangement)
        # Before the projection is loaded, which needs the memory.
        model_cache.evict_others(slot, variant)
        contexts = project_contexts(
            self.session,
            expert_index,
            self.conditioning,
            self.noise.shape[2:],
            self.report,
            f"context{stage_suffix}",
            is_streamed=arrangement.dit != "resident",
        )
        model = model_cache.get_or_load(
            slot,
            variant,
            lambda: self._load_transformer(
                expert_index,
                f"load{stage_suffix}",
                arrangement,
                # A model that stays is called for the next videos too.
                None if model_cache.is_persistent else num_rounds,
            ),
        )
        if isinstance(model, SpeechTransformer):
            assert self.conditioning.picture is not None
            model.clip_inputs = ClipInputs(
                self.conditioning.picture, self.conditioning.history, self.conditioning.pose
            )
        timestep_rows = self._list_timestep_rows(model.dims)
        if not arrangement.shard_dit and not model.has_time_embeddings(timestep_rows):
            # The model was cached by a video with other timesteps.
            component = self.session.checkpoint.transformers[expert_index]
            time_layers = component.load_parts(list_time_layers(component.dims), self.report.device)
            model.precompute_time_embeddings(timestep_rows, time_layers)
        return model, contexts

    def _list_timestep_rows(self, dims: TransformerDims) -> list[Tensor]:
        """Return the timesteps (1, R), or (1, R, 2), that the transformer will be called with."""
        has_known_latents = self.conditioning.known_latents is not None
        timesteps = self.session.possible_timesteps or [
            (timestep, next_timestep, has_known_latents)
            for timestep, next_timestep in self.plan.sampling.schedule.next_timesteps.items()
        ]
        distinct_timesteps = dict.fromkeys(
            (timestep, next_timestep if dims.takes_next_timestep else None, is_known)
            for timestep, next_timestep, is_known in timesteps
        )
        rows = [
            make_timestep_rows(
                timestep,
                next_timestep,
                has_known_frame=is_known,
                has_reference=dims.ref_conv_in_dim > 0,
            )
            for timestep, next_timestep, is_known in distinct_timesteps
        ]
        return [*rows, *([DRIVING_TIMESTEPS] if self.plan.task.is_animate_2 else [])]

    def _build_guidance(
        self,
        model: FusedTransformer,
        contexts: ProjectedContexts,
        guide_scale: float,
        num_done: int,
        arrangement: Arrangement,
    ) -> VelocityFunction:
        """Return the guided prediction.

        Each rank of the cfg axis predicts for one of the contexts, a single rank for both.
        """
        cfg_axis, is_guidance_parallel = self.groups.cfg, self.groups.cfg.size == 2
        if is_guidance_parallel:
            key_values = [contexts.key_values[cfg_axis.rank]]
        else:
            key_values = contexts.key_values[: 1 if guide_scale == 1 else None]
        velocities = VelocityPredictor(
            model,
            key_values,
            self.conditioning,
            self.noise,
            separate_contexts=arrangement.passes == "apart",
            tea_cache=self._make_tea_cache(num_done),
            next_timesteps=self.plan.sampling.schedule.next_timesteps
            if model.dims.takes_next_timestep
            else None,
            control=contexts.control,
        )
        return (
            ParallelGuidance(velocities, scale=guide_scale, axis=cfg_axis)
            if is_guidance_parallel
            else Guidance(velocities, scale=guide_scale)
        )

    def _make_tea_cache(self, num_done: int) -> TeaCache | None:
        if self.plan.tea_fit is None:
            return None
        return TeaCache(
            self.plan.tea_fit,
            num_done=num_done,
            agree=self._broadcast_decision,
            on_guess=self._count_guessed_step,
        )

    def _broadcast_decision(self, decision: bool) -> bool:
        """Return the first rank's decision."""
        return broadcast_object(decision, self.groups.replica)

    def _count_guessed_step(self) -> None:
        self.step_counts["guessed"] += 1

    def _describe_precision(self, *, is_compressed: bool) -> str:
        quant = "GGUF" if is_compressed else self.config.quant
        return self.config.dtype if quant == "none" else f"{quant} and {self.config.dtype}"

    def _load_transformer(
        self, expert_index: int, stage_name: str, arrangement: Arrangement, num_rounds: int | None
    ) -> FusedTransformer:
        component = self.session.checkpoint.transformers[expert_index]
        is_compressed = arrangement.gguf == "compressed"

        def prepare_model(model: FusedTransformer) -> None:
            if is_compressed:
                layers = model.layers()
                parts = find_weight_parts(layers, component.files, component.key_map)
                compress_blocks(layers, parts)
            if self.config.quant != "none":
                quantize_blocks(model.layers().values(), self.config.quant)
            parallelize_transformer(
                model,
                self.groups,
                is_sharded=arrangement.shard_dit,
                usp=self.config.parallel.usp,
                is_driven=self.plan.task.is_animate_2,
            )

        streaming = (
            None
            if arrangement.dit == "resident"
            else StreamingOptions(
                FusedTransformer.layers,
                from_disk=arrangement.dit == "disk",
                num_rounds=num_rounds,
            )
        )
        source_text = {
            "resident": "",
            "stream": ", streamed from host memory",
            "disk": ", streamed from disk",
        }[arrangement.dit]
        with self.report.measure_stage(
            stage_name,
            f"transformer {component.dims.num_layers} x {component.dims.dim}, "
            f"{self._describe_precision(is_compressed=is_compressed)}{source_text}",
        ):
            bytes_before = component.files.bytes_read
            model = component.load(
                self.report.device,
                prepare_model=prepare_model,
                streaming=streaming,
                inner_attention=self.attention,
            )
            if not arrangement.shard_dit:
                model.precompute_time_embeddings(self._list_timestep_rows(model.dims))
        if streaming is None:
            self.report.record_read_speed(stage_name, component.files.bytes_read - bytes_before)
        return model
