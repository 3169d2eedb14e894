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
from wan_dist.output.stage_report import StageReport
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.collectives import broadcast, gather_objects, note_awaited_ranks
from wan_dist.parallel.consistency import ConsistencyCheck, is_set_on_any_rank
from wan_dist.parallel.mesh import set_group_timeout
from wan_dist.pipeline.encode import encode_conditioning
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.predictor import ExpertPredictor
from wan_dist.pipeline.resume import DenoisingProgress, ResumeState
from wan_dist.pipeline.session import Session
from wan_dist.planning.memory_planner import list_fallbacks, replace_transformer_part
from wan_dist.planning.plan import Plan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import PreemptionInterrupt, preemption
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.denoise import denoise_latents
from wan_dist.sampling.noise import draw_initial_noise
from wan_dist.sampling.solvers import make_solver

_SAVE_INTERVAL_SECONDS = 120.0
"""Between two times that progress is kept, for the case that a run is ended without being asked."""


@dataclass(frozen=True)
class VideoInProgress:
    """One in the making."""

    session: Session
    config: RunConfig
    plan: Plan
    report: StageReport
    resume_state: ResumeState
    result_file: Path
    latents_file: Path

    @property
    def is_first(self) -> bool:
        """Whether this rank decodes and writes."""
        return self.session.groups.replica.rank == 0


@torch.no_grad()
def make_latents(video: VideoInProgress) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank, when the first one has them on disk."""
    session, resume_state = video.session, video.resume_state
    if video.config.latents is not None:
        return session.run_together(
            lambda: read_latents(video.latents_file).to(session.device), "read the latents"
        )
    latents = resume_state.progress.latents
    if latents is None or resume_state.progress.num_done < video.config.sample.steps:
        latents = _denoise_with_fallback(video)
    session.run_together(
        lambda: _save_latents(video, latents), "save the latents", uses_collectives=False
    )
    return latents


def _save_latents(video: VideoInProgress, latents: Tensor) -> None:
    if video.is_first:
        save_tensors(video.latents_file, {"latents": latents.cpu()}, video.resume_state.metadata)


def read_latents(file: Path) -> Tensor:
    """Return latents (C, T, h, w), float32, that a run has kept; raises InputError for those of which no video can be made."""
    latents = load_file(file)["latents"].float()
    if not torch.isfinite(latents).all():
        raise InputError(f"latents={file} are not finite: the video would be black")
    return latents


def _denoise_with_fallback(video: VideoInProgress) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank; models that are not to stay are gone from the device then.

    Goes on from the progress that was kept, and where memory ran out on one of several ranks from the step before, with an arrangement
    that takes less. Raises Preempted when this or another rank was asked to end, after a step.
    """
    session, config, plan = video.session, video.config, video.plan
    set_group_timeout(session.groups, config.parallel.load_timeout)
    conditioning = encode_conditioning(session, config, plan, video.report)
    while True:
        try:
            latents = session.run_together(lambda: _run_denoising(video, conditioning), "denoise")
            break
        except torch.OutOfMemoryError as error:
            if not _apply_next_fallback(video, error):
                raise
        free_memory()
        session.run_together(
            lambda: video.resume_state.synchronize_progress(session.groups.replica, session.device),
            "go on from the same step",
        )
    return latents.squeeze(0)


def _apply_next_fallback(video: VideoInProgress, error: torch.OutOfMemoryError) -> bool:
    """Take the next arrangement that takes less, on all ranks; one rank alone has tried them all by itself."""
    session, plan = video.session, video.plan
    current_arrangement = (
        plan.arrangement
        if session.fallback_arrangement is None
        else replace_transformer_part(plan.arrangement, session.fallback_arrangement)
    )
    fallbacks = list_fallbacks(
        current_arrangement, video.config.memory, can_split_passes=plan.negative_prompt is not None
    )
    if session.groups.replica.size == 1 or not fallbacks:
        return False
    session.apply_fallback(fallbacks[0], video.report)
    transformer_text = fallbacks[0].description.partition(";")[0]
    logger.warning(
        "denoising ran out of GPU memory (%s); it goes on after step %d with the %s",
        error,
        video.resume_state.progress.num_done,
        transformer_text,
    )
    return True


def _run_denoising(video: VideoInProgress, conditioning: Conditioning) -> Tensor:
    """Return the latents (1, C, T, h, w); see `_denoised`."""
    session, config, plan, report, resume_state = (
        video.session,
        video.config,
        video.plan,
        video.report,
        video.resume_state,
    )
    groups = session.groups
    initial_latents, num_done = resume_state.progress.latents, resume_state.progress.num_done
    solver = make_solver(config.sample.solver, config.sample.steps, plan.shift)
    if initial_latents is None:
        noise = draw_initial_noise(
            plan.latent_shape,
            seed=plan.seed,
            noise_device=config.noise_device,
            device=report.device,
        )
        initial_latents = broadcast(noise, groups.replica, report.device)
        assert initial_latents is not None
    else:
        solver.restore(num_done, resume_state.progress.solver_state)
    initial_latents = initial_latents.unsqueeze(0)
    attention = session.get_attention()
    report.metadata["attention"] = attention.name
    logger.log(report.log_level, "attention %s (%s)", attention.name, attention.reason)
    if plan.degrees.num_ranks > 1:
        placement_text = "sharded" if plan.arrangement.shard_dit else "on every rank"
        logger.log(report.log_level, "ranks     %s, transformer %s", plan.degrees, placement_text)
    expert_predictor = ExpertPredictor(
        session,
        config,
        plan,
        attention,
        report,
        conditioning,
        initial_latents,
        solver,
        num_done,
        resume_state.progress.step_cache_state,
    )
    predict = ConsistencyCheck(expert_predictor.build_predictor(), groups.replica)
    progress_saver = ProgressSaver(video, expert_predictor)
    with (
        report.measure_stage(
            "denoise", f"{len(solver) - num_done} steps of {config.sample.solver}"
        ),
        preemption.deferred_after_check(),
        logging_redirect_tqdm([logger]),
        note_awaited_ranks(
            groups.replica
        ),  # where sharded weights are gathered, which is not done in our collectives
        progress_saver,
    ):
        wrap_steps = _make_progress_bar if groups.rank == 0 else iter
        known_latents = conditioning.known_latents
        latents = denoise_latents(
            predict,
            initial_latents,
            solver,
            first_step=num_done,
            known_latents=known_latents,
            progress=wrap_steps,
            after_step=progress_saver.record_step,
        )
        if config.cache.steps is not None:
            report.metadata["guessed_steps"] = expert_predictor.step_counts["guessed"]
            logger.log(
                report.log_level,
                "cache     %d of %d steps were guessed",
                expert_predictor.step_counts["guessed"],
                len(solver),
            )
        del predict
        if not session.model_cache.is_persistent:
            free_memory()
    report.other_rank_stages = gather_objects(report.stages, groups.replica)[1:]
    return latents


class ProgressSaver:
    """Holds a video's progress after each step, and keeps it on disk: from time to time, when the run is asked to end, and on an error."""

    def __init__(self, video: VideoInProgress, expert_predictor: ExpertPredictor) -> None:
        self.video, self.expert_predictor = video, expert_predictor
        self.last_saved_seconds = time.monotonic()
        self.num_saved_steps = video.resume_state.progress.num_done

    def record_step(self, num_done: int, latents: Tensor) -> None:
        """Note a step; raises Preempted where this or another rank was asked to end."""
        video, solver = self.video, self.expert_predictor.solver
        axis = video.session.groups.replica
        progress = DenoisingProgress(
            num_done, latents.squeeze(0), solver.state(), self.expert_predictor.state()
        )
        is_requested = is_set_on_any_rank(
            preemption.requested_by is not None, axis, latents.device
        )  # which waits for the step
        video.session.groups.raise_if_aborted()
        video.resume_state.progress = progress
        if num_done == len(solver):
            return
        if is_requested or time.monotonic() - self.last_saved_seconds > _SAVE_INTERVAL_SECONDS:
            self.save_progress()
        if is_requested:
            raise PreemptionInterrupt(
                f"asked to end: stopped after step {num_done} of {len(solver)}; the same command goes on from there"
            )

    def save_progress(self) -> None:
        """Write what there is on the first rank."""
        progress = self.video.resume_state.progress
        self.last_saved_seconds = time.monotonic()
        if (
            self.video.is_first
            and progress.num_done > self.num_saved_steps
            and self.video.resume_state.save_progress(progress)
        ):
            self.num_saved_steps = progress.num_done

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        """Keep the steps that are done where the next one fails."""
        if error_type is not None and not issubclass(error_type, FloatingPointError):
            self.save_progress()


def _make_progress_bar(steps: range) -> Iterable[int]:
    bar_format = "denoise   {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left"
    return tqdm(
        steps,
        bar_format=bar_format,
        initial=steps.start,
        total=steps.stop,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
