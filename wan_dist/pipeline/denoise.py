"""Denoising of one video to its latents, with progress recorded after each step for resuming."""

import sys
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from wan_dist.config.schema import RunConfig
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.output.result_writer import ResultWriter
from wan_dist.output.stage_report import StageReport
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.collectives import broadcast, gather_objects, note_awaited_ranks
from wan_dist.parallel.consistency import ConsistencyCheck
from wan_dist.parallel.mesh import set_group_timeout
from wan_dist.pipeline.encode import encode_conditioning
from wan_dist.pipeline.monitor import (
    EndRequest,
    VideoCancelledError,
    VideoMonitor,
    find_end_request,
)
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.predictor import ExpertPredictor
from wan_dist.pipeline.preview import PreviewWriter
from wan_dist.pipeline.resume import DenoisingProgress, ResumeState
from wan_dist.pipeline.session import Session
from wan_dist.planning.file_names import name_preview
from wan_dist.planning.memory_planner import list_fallbacks, replace_transformer_part
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import CONTINUE_ADVICE, PreemptionInterrupt, preemption
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.sampling.denoise import denoise_latents
from wan_dist.sampling.noise import NoiseSource
from wan_dist.sampling.solvers import Solver, make_solver
from wan_dist.sampling.step_cache import VelocityFunction

_SAVE_INTERVAL_SECONDS = 120.0
"""Interval between two saves of the progress, for a run that is killed without a request to stop."""


@dataclass(frozen=True)
class VideoInProgress:
    """A video, or a clip of it, that is being generated, with its session, settings, plan and files."""

    session: Session
    config: RunConfig
    plan: RunPlan
    report: StageReport
    resume_state: ResumeState
    result_file: Path
    latents_file: Path
    writer: ResultWriter
    monitor: VideoMonitor = field(default_factory=VideoMonitor)
    first_frames: Tensor | None = None
    """Frames (3, n, H, W) in [-1, 1] that a clip after the first starts from, on the CPU."""
    keeps_floats: bool = False
    """The caller needs frames as float32, whatever the file needs."""

    @property
    def is_first(self) -> bool:
        """Whether this rank decodes and writes."""
        return self.session.groups.replica.rank == 0


@torch.no_grad()
def make_latents(video: VideoInProgress) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank, once the first one has saved them."""
    session, resume_state = video.session, video.resume_state
    if video.config.latents is not None:
        return session.run_together(
            lambda: read_latents(video.latents_file).to(session.device), "read the latents"
        )
    latents = resume_state.progress.latents
    num_latents = video.plan.num_video_latents
    is_complete = latents is not None and latents.shape[1] >= num_latents
    if not is_complete or resume_state.progress.num_done < video.config.sample.steps:
        latents = _denoise_with_fallback(video)
    assert latents is not None
    latents = latents[:, -num_latents:].contiguous()  # without reference images
    session.run_together(
        lambda: _save_latents(video, latents), "save the latents", uses_collectives=False
    )
    return latents


def _save_latents(video: VideoInProgress, latents: Tensor) -> None:
    if video.is_first:
        save_tensors(video.latents_file, {"latents": latents.cpu()}, video.resume_state.metadata)


def read_latents(file: Path) -> Tensor:
    """Return saved latents (C, T, h, w), float32; raises InputError if they are not finite."""
    latents = load_file(file)["latents"].float()
    if not torch.isfinite(latents).all():
        raise InputError(f"latents={file} are not finite: the video would be black")
    return latents


def _denoise_with_fallback(video: VideoInProgress) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank; models not cached are off the device then.

    Latent frames that decoding depends on are before them.

    Resumes from saved progress and, where memory ran out on one of several ranks, from the last completed
    step, with an arrangement that needs less memory. Raises PreemptionInterrupt after a step when this or
    another rank was requested to stop.
    """
    session, config, plan = video.session, video.config, video.plan
    set_group_timeout(session.groups, config.parallel.load_timeout)
    conditioning = encode_conditioning(session, config, plan, video.report, video.first_frames)
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
            "continue from the same step",
        )
    context = conditioning.picture if conditioning.history is None else conditioning.history
    if context is not None:  # decoding the clip depends on it
        latents = torch.cat([context.to(latents), latents], dim=2)
    return latents.squeeze(0)


def _apply_next_fallback(video: VideoInProgress, error: torch.OutOfMemoryError) -> bool:
    """Apply the next fallback arrangement on all ranks; returns whether there is one.

    There is none for a single rank, which has tried them all by itself (`FallbackPredictor`).
    """
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
        "denoising ran out of GPU memory (%s); it continues from step %d with the %s",
        error,
        video.resume_state.progress.num_done,
        transformer_text,
    )
    return True


def _run_denoising(video: VideoInProgress, conditioning: Conditioning) -> Tensor:
    """Return the latents (1, C, T, h, w) after the remaining steps; see `_denoise_with_fallback`."""
    session, report, resume_state = video.session, video.report, video.resume_state
    groups, num_done = session.groups, resume_state.progress.num_done
    solver, initial_latents = _prepare_sampling(video)
    attention = session.get_attention()
    _report_setup(video, attention)
    expert_predictor = ExpertPredictor(
        session,
        video.config,
        video.plan,
        attention,
        report,
        conditioning,
        initial_latents,
        solver,
        num_done,
        resume_state.progress.step_cache_state,
    )
    predict: VelocityFunction
    predict = ConsistencyCheck(expert_predictor.build_predictor(), groups.replica)
    preview_writer = _open_preview(video)
    if preview_writer is not None:
        predict = preview_writer.wrap(predict, solver, num_done)
    progress_saver = ProgressSaver(video, expert_predictor)
    stage_detail = f"{len(solver) - num_done} steps of {video.config.sample.solver}"
    with (
        report.measure_stage("denoise", stage_detail),
        preemption.deferred_after_check(),
        logging_redirect_tqdm([logger]),
        # Where sharded weights are gathered, which our own collectives do not do.
        note_awaited_ranks(groups.replica),
        closing(preview_writer) if preview_writer is not None else nullcontext(),
        progress_saver,
    ):
        wrap_steps = _make_progress_bar if groups.rank == 0 else iter
        latents = denoise_latents(
            predict,
            initial_latents,
            solver,
            first_step=num_done,
            known_latents=conditioning.known_latents,
            progress=wrap_steps,
            after_step=progress_saver.record_step,
        )
        if video.config.cache.steps is not None:
            _report_guessed_steps(report, expert_predictor.step_counts["guessed"], len(solver))
        del predict  # the exception holds the transformer
        expert_predictor.forget_driving_video()
        if not session.model_cache.is_persistent or expert_predictor.driving_streams:
            free_memory()
    report.other_rank_stages = gather_objects(report.stages, groups.replica)[1:]
    return latents


def _open_preview(video: VideoInProgress) -> PreviewWriter | None:
    """Return the writer of previews on the replica's first rank, None elsewhere and without previews."""
    interval, plan = video.config.output.preview_interval, video.plan
    if not interval or not video.is_first:
        return None
    file = video.result_file.with_name(name_preview(video.result_file.stem))
    if plan.clip_index == 0:
        logger.log(video.report.log_level, "preview   %s", file)
    return PreviewWriter(
        file,
        video.session.checkpoint.vae.dims,
        video.report.device,
        interval=interval,
        frame_index=plan.num_reference_frames + plan.num_clip_latents // 2,
        report_written=partial(video.monitor.record_preview, file, plan.clip_index),
    )


def _prepare_sampling(video: VideoInProgress) -> tuple[Solver, Tensor]:
    """Return the solver and latents (1, C, T, h, w) to start from: of saved progress, or initial noise."""
    config, plan, device = video.config, video.plan, video.report.device
    progress = video.resume_state.progress

    def share_noise(noise: Tensor) -> Tensor:
        shared = broadcast(noise.to(device), video.session.groups.replica, device)
        assert shared is not None
        return shared

    # With a driving video, the noise of all clips is drawn one after the other, as in the reference.
    num_seeds, num_draws = (plan.clip_index, 0) if plan.driving is None else (0, plan.clip_index)
    noise = NoiseSource(
        plan.latent_shape,
        seed=(plan.seed + num_seeds) % 2**64,
        device=config.noise_device,
        frames_first=config.noise_layout == "frames_first",
        share=share_noise,
    )
    noise.skip(num_draws, plan.workload.latent_shape)  # earlier clips may be longer than the last
    solver = make_solver(config.sample.solver, plan.sampling.schedule, noise)
    if progress.latents is None:
        return solver, solver.scale_initial_noise(noise.draw())
    noise.skip(1)
    solver.restore(progress.num_done, progress.solver_state)
    return solver, progress.latents.unsqueeze(0)


def _report_setup(video: VideoInProgress, attention: InnerAttention) -> None:
    """Record and log the attention kernel, and the parallel degrees of several ranks."""
    plan, report = video.plan, video.report
    report.record.attention = attention.name
    if trained := video.session.checkpoint.transformers[0].dims.trained_attention:
        report.record.attention = trained
        logger.log(report.log_level, "attention %s (trained with it), in cross-attention:", trained)
    logger.log(report.log_level, "attention %s (%s)", attention.name, attention.reason)
    if plan.degrees.num_ranks > 1:
        placement_text = "sharded" if plan.arrangement.shard_dit else "on every rank"
        logger.log(report.log_level, "ranks     %s, transformer %s", plan.degrees, placement_text)


def _report_guessed_steps(report: StageReport, num_guessed: int, num_steps: int) -> None:
    """Record and log how many steps the step cache guessed; the record has the sum of all clips."""
    report.record.guessed_steps = (report.record.guessed_steps or 0) + num_guessed
    logger.log(report.log_level, "cache     %d of %d steps were guessed", num_guessed, num_steps)


class ProgressSaver:
    """Records a video's progress after each step, and saves it to disk.

    It is saved at intervals, when the run is requested to stop, and on an error.
    """

    def __init__(self, video: VideoInProgress, expert_predictor: ExpertPredictor) -> None:
        self.video, self.expert_predictor = video, expert_predictor
        self.last_saved_seconds = time.monotonic()
        self.num_saved_steps = video.resume_state.progress.num_done

    def record_step(self, num_done: int, latents: Tensor) -> None:
        """Record a step.

        Raises PreemptionInterrupt where this or another rank was requested to stop, and VideoCancelledError
        where the video was cancelled.
        """
        video, solver = self.video, self.expert_predictor.solver
        axis = video.session.groups.replica
        progress = DenoisingProgress(
            num_done, latents.squeeze(0), solver.state(), self.expert_predictor.state()
        )
        # This also waits for the step.
        request = find_end_request(video.monitor, axis, latents.device)
        video.session.groups.raise_if_aborted()
        video.resume_state.progress = progress
        if video.is_first:
            video.monitor.record_step(video.plan.clip_index, num_done)
        if request is EndRequest.CANCEL:
            raise VideoCancelledError(f"cancelled after step {num_done} of {len(solver)}")
        if num_done == len(solver):
            return
        is_requested = request is EndRequest.STOP
        if is_requested or time.monotonic() - self.last_saved_seconds > _SAVE_INTERVAL_SECONDS:
            self.save_progress()
        if is_requested:
            raise PreemptionInterrupt(
                f"{preemption.describe_request()}: stopped after step {num_done} of {len(solver)}; "
                f"{CONTINUE_ADVICE}"
            )

    def save_progress(self) -> None:
        """Save the progress on the first rank, if it has steps that are not saved yet."""
        progress = self.video.resume_state.progress
        self.last_saved_seconds = time.monotonic()
        if (
            self.video.is_first
            and progress.num_done > self.num_saved_steps
            and self.video.resume_state.save_progress(progress)
        ):
            self.num_saved_steps = progress.num_done

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        """Save the completed steps where the next one fails."""
        unsaved_errors = (FloatingPointError, VideoCancelledError)
        if error_type is not None and not issubclass(error_type, unsaved_errors):
            self.save_progress()


def _make_progress_bar(steps: range) -> Iterable[int]:
    bar_format = (
        "denoise   {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, "
        "{rate_inv_fmt}, {remaining} left"
    )
    return tqdm(
        steps,
        bar_format=bar_format,
        initial=steps.start,
        total=steps.stop,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
