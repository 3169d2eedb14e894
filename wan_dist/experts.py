"""The transformers of a run: each loaded when its first timestep comes, as a prediction of the velocity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wan_dist.arrangement import rungs_below
from wan_dist.catalog import NUM_TRAIN_TIMESTEPS
from wan_dist.config import RunConfig
from wan_dist.encode import project_contexts
from wan_dist.footprint import Arrangement
from wan_dist.log import logger
from wan_dist.memory import free_memory
from wan_dist.models.attention import InnerAttention
from wan_dist.models.quantized import quantize_blocks
from wan_dist.models.transformer import WanTransformer
from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.cfg import ParallelGuidance
from wan_dist.parallel.mesh import Groups, limit_waiting
from wan_dist.plan import Plan
from wan_dist.report import Report
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.denoise import Guidance, Predict, TwoExperts, rows_of
from wan_dist.sampling.solvers import Solver
from wan_dist.streaming import Streaming
from wan_dist.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Experts:
    """What opening a transformer takes; ``noise`` has the latents' shape."""

    checkpoint: Checkpoint
    config: RunConfig
    plan: Plan
    attention: InnerAttention
    groups: Groups
    report: Report
    conditioning: Conditioning
    noise: Tensor
    solver: Solver

    def predict(self) -> Predict:
        """Return the run's prediction: by one transformer, or by that for high noise and then that for low."""
        low_scale, high_scale = self.plan.guide_scales
        if self.plan.task.boundary is None:
            return self.open(0, "", high_scale)
        boundary = self.plan.task.boundary * NUM_TRAIN_TIMESTEPS
        high = sum(timestep >= boundary for timestep in self.solver.timesteps)
        logger.info("experts   high noise for the first %d steps, low noise for the other %d", high, len(self.solver) - high)
        return TwoExperts(
            lambda: self.open(0, " high", high_scale),
            lambda: self.open(1, " low", low_scale),
            boundary=boundary,
            early=self.plan.arrangement.shard_dit,  # two shards are less than one whole expert
        )

    def open(self, which: int, suffix: str, scale: float) -> Predict:
        """Load a transformer as it is planned; ``suffix`` goes to its stages' names.

        Where one rank's GPU runs out of memory, the step is repeated with an arrangement that needs less.
        """
        can_part = scale != 1 and self.conditioning.negative_context is not None
        rungs = rungs_below(self.plan.arrangement, self.config.memory, can_part=can_part) if self.groups.replica.size == 1 else []
        opened = [self._open(which, suffix, scale, self.plan.arrangement)]

        def predict(latents: Tensor, timestep: int) -> Tensor:
            while True:
                try:
                    return opened[0](latents, timestep)
                except torch.OutOfMemoryError:
                    if not rungs:
                        raise
                lower = rungs.pop(0)
                opened.clear()
                logger.warning("denoising ran out of GPU memory; the step is repeated with the %s", lower.words.partition(";")[0])
                opened.append(self._open(which, suffix, scale, lower))

        return predict

    def _open(self, which: int, suffix: str, scale: float, arrangement: Arrangement) -> Predict:
        groups = self.groups
        limit_waiting(groups, self.config.parallel.load_timeout)
        free_memory()  # what was there before
        projection = self.checkpoint.projections[which]
        contexts = project_contexts(
            projection, self.conditioning, groups, self.report, f"context{suffix}", streamed=arrangement.dit != "resident"
        )
        model = self._load(which, f"load{suffix}", arrangement)
        limit_waiting(groups, self.config.parallel.timeout)
        if groups.cfg.size == 2:
            return ParallelGuidance(model, contexts, self.conditioning, self.noise, scale=scale, axis=groups.cfg)
        return Guidance(model, contexts, self.conditioning, self.noise, scale=scale, apart=arrangement.passes == "apart")

    @property
    def _precision(self) -> str:
        return self.config.dtype if self.config.quant == "none" else f"{self.config.quant} and {self.config.dtype}"

    def _load(self, which: int, stage: str, arrangement: Arrangement) -> WanTransformer:
        component = self.checkpoint.transformers[which]

        def spread(model: WanTransformer) -> None:
            if self.config.quant != "none":
                quantize_blocks(model.blocks, self.config.quant)
            parallelize_transformer(model, self.groups, shard=arrangement.shard_dit, usp=self.config.parallel.usp)

        streaming = None if arrangement.dit == "resident" else Streaming("blocks", from_disk=arrangement.dit == "disk")
        where = {"resident": "", "stream": ", streamed from host memory", "disk": ", streamed from disk"}[arrangement.dit]
        with self.report.stage(stage, f"transformer {component.dims.num_layers} x {component.dims.dim}, {self._precision}{where}"):
            before = component.files.bytes_read
            model = component.load(self.report.device, spread=spread, streaming=streaming, inner_attention=self.attention)
            model.slice_tokens(arrangement.slice_tokens)
            if not arrangement.shard_dit:
                has_known_frame = self.conditioning.known_latents is not None
                model.keep_times(rows_of(timestep, has_known_frame=has_known_frame) for timestep in dict.fromkeys(self.solver.timesteps))
        if streaming is None:
            self.report.rate(stage, component.files.bytes_read - before)
        return model
