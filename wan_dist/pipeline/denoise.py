"""A video in the making, up to its latents: progress is held after each step, and nothing of it is lost."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from wan_dist.config.schema import RunConfig
from wan_dist.output.stage_report import Report
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.collectives import broadcast, gather_objects, name_those_awaited
from wan_dist.parallel.consistency import Agreeing, is_any
from wan_dist.parallel.mesh import limit_waiting
from wan_dist.pipeline.encode import encode
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.predictor import Experts
from wan_dist.pipeline.resume import Kept, Progress
from wan_dist.pipeline.session import Session
from wan_dist.planning.memory_planner import rungs_below, with_transformer_of
from wan_dist.planning.plan import Plan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import Preempted, preemption
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.denoise import denoise
from wan_dist.sampling.noise import initial_noise
from wan_dist.sampling.solvers import make_solver

_KEEP_SECONDS = 120.0
"""Between two times that progress is kept, for the case that a run is ended without being asked."""


@dataclass(frozen=True)
class Video:
    """One in the making."""

    session: Session
    config: RunConfig
    plan: Plan
    report: Report
    kept: Kept
    result: Path
    latents_file: Path

    @property
    def is_first(self) -> bool:
        """Whether this rank decodes and writes."""
        return self.session.groups.replica.rank == 0


@torch.no_grad()
def make_latents(video: Video) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank, when the first one has them on disk."""
    session, kept = video.session, video.kept
    if video.config.latents is not None:
        return session.together(lambda: read_latents(video.latents_file).to(session.device), "read the latents")
    latents = kept.progress.latents
    if latents is None or kept.progress.num_done < video.config.sample.steps:
        latents = _denoised(video)
    session.together(lambda: _save_latents(video, latents), "save the latents", exchanges=False)
    return latents


def _save_latents(video: Video, latents: Tensor) -> None:
    if video.is_first:
        save_tensors(video.latents_file, {"latents": latents.cpu()}, video.kept.facts)


def read_latents(file: Path) -> Tensor:
    """Return latents (C, T, h, w), float32, that a run has kept; raises InputError for those of which no video can be made."""
    latents = load_file(file)["latents"].float()
    if not torch.isfinite(latents).all():
        raise InputError(f"latents={file} are not finite: the video would be black")
    return latents


def _denoised(video: Video) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank; models that are not to stay are gone from the device then.

    Goes on from the progress that was kept, and where memory ran out on one of several ranks from the step before, with an arrangement
    that takes less. Raises Preempted when this or another rank was asked to end, after a step.
    """
    session, config, plan = video.session, video.config, video.plan
    limit_waiting(session.groups, config.parallel.load_timeout)
    conditioning = encode(session, config, plan, video.report)
    while True:
        try:
            latents = session.together(lambda: _denoise(video, conditioning), "denoise")
            break
        except torch.OutOfMemoryError as fault:
            if not _step_down(video, fault):
                raise
        free_memory()
        session.together(lambda: video.kept.agree(session.groups.replica, session.device), "go on from the same step")
    return latents.squeeze(0)


def _step_down(video: Video, fault: torch.OutOfMemoryError) -> bool:
    """Take the next arrangement that takes less, on all ranks; one rank alone has tried them all by itself."""
    session, plan = video.session, video.plan
    taken = plan.arrangement if session.lowered is None else with_transformer_of(plan.arrangement, session.lowered)
    lower = rungs_below(taken, video.config.memory, can_part=plan.negative_prompt is not None)
    if session.groups.replica.size == 1 or not lower:
        return False
    session.lower(lower[0], video.report)
    how = lower[0].words.partition(";")[0]
    logger.warning("denoising ran out of GPU memory (%s); it goes on after step %d with the %s", fault, video.kept.progress.num_done, how)
    return True


def _denoise(video: Video, conditioning: Conditioning) -> Tensor:
    """Return the latents (1, C, T, h, w); see `_denoised`."""
    session, config, plan, report, kept = video.session, video.config, video.plan, video.report, video.kept
    groups = session.groups
    start, num_done = kept.progress.latents, kept.progress.num_done
    solver = make_solver(config.sample.solver, config.sample.steps, plan.shift)
    if start is None:
        noise = initial_noise(plan.latent_shape, seed=plan.seed, noise_device=config.noise_device, device=report.device)
        start = broadcast(noise, groups.replica, report.device)
        assert start is not None
    else:
        solver.go_on(num_done, kept.progress.solver)
    start = start.unsqueeze(0)
    attention = session.choose()
    report.facts["attention"] = attention.name
    logger.log(report.level, "attention %s (%s)", attention.name, attention.reason)
    if plan.degrees.num_ranks > 1:
        how = "sharded" if plan.arrangement.shard_dit else "on every rank"
        logger.log(report.level, "ranks     %s, transformer %s", plan.degrees, how)
    experts = Experts(session, config, plan, attention, report, conditioning, start, solver, num_done, kept.progress.guesses)
    predict = Agreeing(experts.predict(), groups.replica)
    keeper = Keeper(video, experts)
    with (
        report.stage("denoise", f"{len(solver) - num_done} steps of {config.sample.solver}"),
        preemption.until_asked(),
        logging_redirect_tqdm([logger]),
        name_those_awaited(groups.replica),  # where sharded weights are gathered, which is not done in our collectives
        keeper,
    ):
        bar = _progress_bar if groups.rank == 0 else iter
        known = conditioning.known_latents
        latents = denoise(predict, start, solver, first=num_done, known_latents=known, progress=bar, after_step=keeper.after_step)
        if config.cache.steps is not None:
            report.facts["guessed_steps"] = experts.counts["guessed"]
            logger.log(report.level, "cache     %d of %d steps were guessed", experts.counts["guessed"], len(solver))
        del predict
        if not session.shelf.keeps:
            free_memory()
    report.other_ranks = gather_objects(report.stages, groups.replica)[1:]
    return latents


class Keeper:
    """Holds a video's progress after each step, and keeps it on disk: from time to time, when the run is asked to end, and on an error."""

    def __init__(self, video: Video, experts: Experts) -> None:
        self.video, self.experts = video, experts
        self.kept_at = time.monotonic()
        self.num_kept = video.kept.progress.num_done

    def after_step(self, num_done: int, latents: Tensor) -> None:
        """Note a step; raises Preempted where this or another rank was asked to end."""
        video, solver = self.video, self.experts.solver
        axis = video.session.groups.replica
        progress = Progress(num_done, latents.squeeze(0), solver.state(), self.experts.state())
        asked = is_any(preemption.asked_by is not None, axis, latents.device)  # which waits for the step
        video.session.groups.check()
        video.kept.progress = progress
        if num_done == len(solver):
            return
        if asked or time.monotonic() - self.kept_at > _KEEP_SECONDS:
            self.keep()
        if asked:
            raise Preempted(f"asked to end: stopped after step {num_done} of {len(solver)}; the same command goes on from there")

    def keep(self) -> None:
        """Write what there is on the first rank."""
        progress = self.video.kept.progress
        self.kept_at = time.monotonic()
        if self.video.is_first and progress.num_done > self.num_kept and self.video.kept.write(progress):
            self.num_kept = progress.num_done

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Keep the steps that are done where the next one fails."""
        if kind is not None and not issubclass(kind, FloatingPointError):
            self.keep()


def _progress_bar(steps: range) -> Iterable[int]:
    form = "denoise   {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left"
    return tqdm(steps, bar_format=form, initial=steps.start, total=steps.stop, mininterval=0.1 if sys.stderr.isatty() else 10.0)
