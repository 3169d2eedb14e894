"""The transformers of a run: each loaded when its first timestep comes, as a prediction of the velocity."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import ReferenceType

import torch
from torch import Tensor

from wan_dist.config.schema import MemoryConfig, RunConfig
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.kernels.quantized_linear import quantize_blocks
from wan_dist.models.transformer import WanTransformer
from wan_dist.output.stage_report import Report
from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.cfg import ParallelGuidance
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.mesh import Groups, limit_waiting
from wan_dist.parallel.shared_work import NoRoomError
from wan_dist.pipeline.contexts import project_contexts
from wan_dist.pipeline.out_of_memory import free_memory, make_sure_of_room
from wan_dist.pipeline.session import Session
from wan_dist.planning.memory_estimate import activation_bytes
from wan_dist.planning.memory_planner import rungs_below, with_transformer_of
from wan_dist.planning.plan import Plan
from wan_dist.planning.workload import Arrangement
from wan_dist.runtime.log import logger
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.guidance import Guidance, TwoExperts, Velocities, rows_of
from wan_dist.sampling.solvers import Solver
from wan_dist.sampling.step_cache import EasyCache, Predict, TeaCache
from wan_dist.tasks.registry import NUM_TRAIN_TIMESTEPS
from wan_dist.weights.streaming import Streaming

Result = TypeVar("Result")


@dataclass(frozen=True)
class Experts:
    """What opening a transformer takes; ``noise`` has the latents' shape."""

    session: Session
    config: RunConfig
    plan: Plan
    attention: InnerAttention
    report: Report
    conditioning: Conditioning
    noise: Tensor
    solver: Solver
    num_done: int = 0
    """Steps that were done before, by a run that this one goes on with."""
    guesses: dict[str, Tensor] = field(default_factory=dict)
    """What that run's step cache left; see `EasyCache.state`."""
    caches: list[ReferenceType[EasyCache]] = field(default_factory=list)
    """Of the transformers that were opened; those that are let go are not held."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many steps were ``guessed``."""

    @property
    def groups(self) -> Groups:
        """The ranks."""
        return self.session.groups

    def predict(self) -> Predict:
        """Return the run's prediction: by one transformer, or by that for high noise and then that for low."""
        low_scale, high_scale = self.plan.guide_scales
        if self.plan.task.boundary is None:
            return self.open(0, "", high_scale, len(self.solver), self.num_done)
        boundary = self.plan.task.boundary * NUM_TRAIN_TIMESTEPS
        high = sum(timestep >= boundary for timestep in self.solver.timesteps)
        logger.info("experts   high noise for the first %d steps, low noise for the other %d", high, len(self.solver) - high)
        return TwoExperts(
            lambda: self.open(0, " high", high_scale, high, self.num_done),
            lambda: self.open(1, " low", low_scale, len(self.solver) - high, max(0, self.num_done - high)),
            boundary=boundary,
            early=self.plan.arrangement.shard_dit,  # two shards are less than one whole expert
        )

    def open(self, which: int, suffix: str, scale: float, num_steps: int, num_done: int) -> Predict:
        """Load a transformer as it is planned, for ``num_steps`` steps of which some are done; ``suffix`` goes to its stages' names.

        Where a GPU runs out of memory it is loaded, or the step is repeated, with an arrangement that needs less. Several ranks look
        for room before the first step instead: one that ran out in the middle of it would leave the others waiting.
        """
        can_part = scale != 1 and self.conditioning.negative_context is not None
        planned, lowered = self.plan.arrangement, self.session.lowered
        rungs = [planned, *rungs_below(planned, self.config.memory, can_part=can_part)]
        if lowered is not None and (taken := with_transformer_of(planned, lowered)) in rungs:
            rungs = rungs[rungs.index(taken) :]  # the video before this one found that those above take too much
        predict = SteppingDown(
            lambda arrangement: self._open(which, suffix, scale, num_done, arrangement),
            rungs,
            can_part=can_part,
            at=torch.OutOfMemoryError if self.groups.replica.size == 1 else NoRoomError,  # what one rank meets alone ends the run
            note=self._note_lower,
        )
        if self.config.cache.steps != "easy":
            return predict
        threshold = self.config.cache.threshold or 0.05
        cache = EasyCache(predict, num_steps=num_steps, num_done=num_done, threshold=threshold, agree=self._agree, note=self._note)
        if num_done and self.guesses:
            cache.go_on(self.guesses)
        self.caches.append(ReferenceType(cache))
        return cache

    def _note_lower(self, arrangement: Arrangement) -> None:
        self.session.lower(arrangement, self.report)

    def state(self) -> dict[str, Tensor]:
        """Return what the step cache of the transformer that is at work leaves for a run that goes on."""
        caches = [cache for reference in reversed(self.caches) if (cache := reference()) is not None]
        return next((state for cache in caches if (state := cache.state())), {})

    def _open(self, which: int, suffix: str, scale: float, num_done: int, arrangement: Arrangement) -> Predict:
        groups = self.groups
        limit_waiting(groups, self.config.parallel.load_timeout)
        if not self.session.shelf.keeps:
            free_memory()  # what was there before
        shelf, place = self.session.shelf, self.session.place("transformer", which)
        shelf.make_way(place, (which, arrangement))
        contexts = project_contexts(
            self.session, which, self.conditioning, self.report, f"context{suffix}", streamed=arrangement.dit != "resident"
        )
        model = shelf.take(place, (which, arrangement), lambda: self._load(which, f"load{suffix}", arrangement))
        model.slice_tokens(arrangement.slice_tokens)
        if groups.replica.size > 1 and self.plan.load is not None:
            make_sure_of_room(activation_bytes(self.plan.load, arrangement), self.report.device, groups.replica)
        limit_waiting(groups, self.config.parallel.timeout)
        tea = None if self.plan.tea is None else TeaCache(self.plan.tea, num_done=num_done, agree=self._agree, note=self._note)
        is_shared = groups.cfg.size == 2
        own = [contexts[groups.cfg.rank]] if is_shared else contexts[:1] if scale == 1 else contexts
        velocities = Velocities(model, own, self.conditioning, self.noise, apart=arrangement.passes == "apart", tea=tea)
        return ParallelGuidance(velocities, scale=scale, axis=groups.cfg) if is_shared else Guidance(velocities, scale=scale)

    def _agree(self, decision: bool) -> bool:
        """Return the first rank's decision."""
        return broadcast_object(decision, self.groups.replica)

    def _note(self) -> None:
        self.counts["guessed"] += 1

    @property
    def _precision(self) -> str:
        return self.config.dtype if self.config.quant == "none" else f"{self.config.quant} and {self.config.dtype}"

    def _load(self, which: int, stage: str, arrangement: Arrangement) -> WanTransformer:
        component = self.session.checkpoint.transformers[which]

        def spread(model: WanTransformer) -> None:
            if self.config.quant != "none":
                quantize_blocks(model.blocks, self.config.quant)
            parallelize_transformer(model, self.groups, shard=arrangement.shard_dit, usp=self.config.parallel.usp)

        streaming = None if arrangement.dit == "resident" else Streaming("blocks", from_disk=arrangement.dit == "disk")
        where = {"resident": "", "stream": ", streamed from host memory", "disk": ", streamed from disk"}[arrangement.dit]
        with self.report.stage(stage, f"transformer {component.dims.num_layers} x {component.dims.dim}, {self._precision}{where}"):
            before = component.files.bytes_read
            model = component.load(self.report.device, spread=spread, streaming=streaming, inner_attention=self.attention)
            if not arrangement.shard_dit:
                has_known = self.conditioning.known_latents is not None
                times = self.session.times or [(timestep, has_known) for timestep in self.solver.timesteps]
                model.keep_times(rows_of(timestep, has_known_frame=is_known) for timestep, is_known in dict.fromkeys(times))
        if streaming is None:
            self.report.rate(stage, component.files.bytes_read - before)
        return model


class SteppingDown:
    """A prediction that is made with the next of the arrangements ``rungs`` where the GPU's memory runs out, from loading on.

    Raises torch.OutOfMemoryError after the last, with what else would take less; ``at`` is the error to step down at. ``note`` is told
    each arrangement after the first.
    """

    def __init__(
        self,
        load: Callable[[Arrangement], Predict],
        rungs: Sequence[Arrangement],
        *,
        can_part: bool,
        at: type[torch.OutOfMemoryError],
        note: Callable[[Arrangement], None],
    ) -> None:
        self._load, self._rungs, self._can_part, self._at, self._note = load, list(rungs), can_part, at, note
        self._loaded: Predict | None = None
        self._in_any_way(self._predict)

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return what the transformer predicts."""
        return self._in_any_way(lambda: self._predict()(latents, timestep))

    def _predict(self) -> Predict:
        if self._loaded is None:
            self._loaded = self._load(self._rungs[0])
        return self._loaded

    def _in_any_way(self, work: Callable[[], Result]) -> Result:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as fault:
                if len(self._rungs) == 1 or not isinstance(fault, self._at):
                    fault.add_note(f"with the {_transformer(self._rungs[0])}; {_what_takes_less(self._rungs[0], can_part=self._can_part)}")
                    raise
            self._loaded = None
            del self._rungs[0]
            self._note(self._rungs[0])
            logger.warning("denoising ran out of GPU memory; the step is repeated with the %s", _transformer(self._rungs[0]))


def _transformer(arrangement: Arrangement) -> str:
    return arrangement.words.partition(";")[0]


def _what_takes_less(taken: Arrangement, *, can_part: bool) -> str:
    """Return the settings with which the transformer would take less than it has, in words."""
    lower = rungs_below(taken, MemoryConfig(), can_part=can_part)[:1]
    settings = [
        f"memory.{key}={getattr(rung, key)}"
        for rung in lower
        for key in ("slice_tokens", "passes", "dit")
        if getattr(rung, key) != getattr(taken, key)
    ]
    return f"{settings[0]} would take less" if settings else "a smaller size or fewer frames would take less"
