"""Job worker of a batch run: loads the models once and makes one job of the queue after the other.

Each replica takes the next job that is not done. Jobs that an earlier run has done are not made again.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import Effect
from wan_dist.jobs.event_monitor import EventMonitor
from wan_dist.jobs.events import JobEvents
from wan_dist.jobs.failure_policy import FailurePolicy
from wan_dist.jobs.planned_job import PlannedJob, sort_by_model
from wan_dist.jobs.queue import JobQueue
from wan_dist.jobs.run_log import RunLog, add_contact_sheet
from wan_dist.output.output_check import check_output_folder, estimate_output
from wan_dist.output.record import FAILED
from wan_dist.output.record_fields import describe_video
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.mesh import (
    ProcessGroups,
    make_process_groups,
    process_group_session,
    set_group_timeout,
)
from wan_dist.parallel.shared_work import describe_error
from wan_dist.parallel.team import Coordinator
from wan_dist.pipeline.clips import make_clips
from wan_dist.pipeline.denoise import VideoInProgress
from wan_dist.pipeline.generate import (
    decode_and_write,
    decode_to_host,
    prepare_video,
    write_decoded_frames,
)
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.resume import ResumeState, warn_about_old_states
from wan_dist.pipeline.session import Session, find_device, open_session
from wan_dist.pipeline.text_embeddings import embed_prompts_ahead, share_prompt_embeddings
from wan_dist.planning.residency import can_buffer_frames
from wan_dist.runtime.durations import format_duration
from wan_dist.runtime.errors import format_message
from wan_dist.runtime.log import add_log_file, logger, show_announcements
from wan_dist.tasks.fun import START_KEYS
from wan_dist.tasks.input_files import list_input_files

_EMBEDDINGS_FOLDER = ".texts"
"""Folder of prompt embeddings, in the output folder, which all replicas see."""


@torch.no_grad()
def run_jobs(
    config: RunConfig,
    jobs: Sequence[PlannedJob],
    arguments: Sequence[str],
    coordinator: Coordinator,
) -> int:
    """Make all jobs that are not done, and return the exit code: 1 if some have failed.

    ``config`` is the run's, without settings of a job; ``arguments`` are those of its command line. Raises
    InputError for an invalid checkpoint or output folder, before weights are read.
    """
    device = find_device(config)
    groups = make_process_groups(jobs[0].plan.degrees, coordinator, device, config.parallel.timeout)
    run_id = coordinator.run_on_first_rank(make_run_id, "begin")
    job_worker = JobWorker(config, sort_by_model(jobs), groups, device, run_id, arguments)
    try:
        return job_worker.run()
    finally:
        job_worker.close()


def make_run_id() -> str:
    """Return the name of a new run: its time, and something random."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


@dataclass
class JobWorker:
    """Makes the jobs of a run, on one rank."""

    config: RunConfig
    jobs: list[PlannedJob]
    groups: ProcessGroups
    device: torch.device
    run_id: str
    arguments: Sequence[str]
    start_time: float = field(default_factory=time.time)
    sessions: dict[str, Session] = field(default_factory=dict)
    write_executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    pending_write: Future[None] | None = None
    """The video that is written while the next one is denoised."""

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output.dir).expanduser()
        self.is_first = self.groups.replica.rank == 0
        self.coordinator = self.groups.coordinator
        self.report = StageReport(asdict(self.config), self.device)
        self.failure_policy = FailurePolicy()
        self.queue = JobQueue(
            self.groups,
            self.folder,
            self.jobs,
            lambda job: self._make_resume_state(job).result_digest,
        )

    def run(self) -> int:
        """Make the jobs; see `run_jobs`."""
        self.open_output()
        num_failed_before = self.queue.find_remaining_jobs(retry_failed=self.config.retry_failed)
        num_remaining = len(self.queue.remaining_jobs)
        self.begin_log(num_remaining)
        if not num_remaining:
            return self._summarize_run(num_failed_before)
        with process_group_session(self.groups):
            set_group_timeout(self.groups, self.config.parallel.load_timeout)
            self._prepare_sessions()
            set_group_timeout(self.groups, self.config.parallel.timeout)
            try:
                while (job := self.queue.take_next_job()) is not None:
                    self.make_video(job)
                self.wait_for_write()
                self.queue.wait_for_replicas()
            finally:
                if self.groups.rank == 0:
                    self.run_log.write_page(self.events.compute_progress(), has_ended=True)
        return self._summarize_run(num_failed_before)

    def open_output(self) -> None:
        """Check the output folder, and open the checkpoints and the ranks' log files."""
        if self.groups.rank == 0:
            check_output_folder(
                self.folder,
                [estimate_output(job.plan, job.config.output) for job in self.jobs],
            )
            warn_about_old_states(self.folder)
        self._open_sessions()
        if self.coordinator.num_ranks > 1:
            add_log_file(self.folder / "logs" / self.run_id)
        if self.is_first:
            show_announcements()
        self.queue.check_shared_folder()

    def begin_log(self, num_jobs: int | None) -> None:
        """Open the run's log and events; ``num_jobs`` is None where jobs are added during the run."""
        self.run_log = RunLog(
            self.folder,
            self.run_id,
            self.arguments,
            self.coordinator.num_ranks,
            num_jobs,
            self.report.stages,
        )
        self.events = JobEvents(self.config.output.events, num_jobs, self.queue.counters)

    def close(self) -> None:
        """Wait for the video that is being written, if any."""
        self.write_executor.shutdown(wait=True, cancel_futures=True)
        self.queue.locks.close()

    def _open_sessions(self) -> None:
        for job in self.jobs:
            if job.model_key not in self.sessions:
                with self.report.measure_stage("check", f"{job.config.task}, output {self.folder}"):
                    session = open_session(job.config, job.plan, self.groups, self.device)
                    session.model_cache = ModelCache(is_persistent=True)
                    self.sessions[job.model_key] = session

    def _make_resume_state(self, job: PlannedJob) -> ResumeState:
        return ResumeState(
            self.folder,
            job.config,
            job.plan,
            self.sessions[job.model_key].weights_digests,
            is_job=True,
            locks=self.queue.locks,
        )

    def _prepare_sessions(self) -> None:
        """Decide which models stay in memory, and embed all prompts: each replica a shard of them."""
        for model_key, session in self.sessions.items():
            jobs = [
                job
                for job in self.queue.remaining_jobs
                if job.model_key == model_key and job.config.latents is None
            ]
            if not jobs:
                continue
            largest_job = max(jobs, key=lambda job: job.plan.num_tokens)
            session.choose_resident_models(largest_job.plan)
            plan = session.plan_memory(largest_job.plan)
            self.run_log.plans.append(plan)
            bytes_per_value = max(job.config.output.bytes_per_value for job in jobs)
            session.has_memory_for_frames = can_buffer_frames(plan, bytes_per_value)
            session.possible_timesteps = tuple(
                dict.fromkeys(timestep for job in jobs for timestep in list_timesteps(job))
            )
            texts = sorted({text for job in jobs for text in job.plan.texts})
            text_shard = texts[self.groups.dp.rank :: self.groups.dp.size]
            embed = partial(
                embed_prompts_ahead, session, largest_job.config, plan, text_shard, self.report
            )
            session.run_together(embed, "encode the prompts")
            share_prompt_embeddings(session, texts, self.folder / _EMBEDDINGS_FOLDER)

    def make_video(self, job: PlannedJob) -> None:
        """Make one job; an error that concerns it alone ends in its record, on all ranks of the replica."""
        session = self.sessions[job.model_key]
        for model_key, other_session in self.sessions.items():
            if model_key != job.model_key:
                other_session.model_cache.clear()
        report = StageReport(asdict(job.config), self.device, quiet=True)
        describe_video(report.record, job.plan)
        report.record.run = self.run_id
        report.record.job = {"file": str(job.source.file), "line": job.source.line}
        report.record.rank = self.groups.rank
        if self.is_first:
            self.events.write_event("begun", job=job.name, line=job.source.line)
        if not session.has_memory_for_frames:
            self.wait_for_write()
        frames: list[Tensor] = []
        try:
            for video, latents in make_clips(self.start_video(job, session, report)):
                if session.has_memory_for_frames and video.plan.is_last_clip:
                    frames = decode_to_host(video, latents)
                else:
                    decode_and_write(video, latents)
        except Exception as error:
            self.wait_for_write()
            self.record_failure(job, report, error)
            return
        if not (self.is_first and session.has_memory_for_frames):
            self.failure_policy.record_success()
        self.wait_for_write()
        if self.is_first and session.has_memory_for_frames:
            self.pending_write = self.write_executor.submit(
                self._write_video, job, video, latents, frames
            )
        elif self.is_first:
            self.finish_job(job, video)

    def start_video(
        self, job: PlannedJob, session: Session, report: StageReport
    ) -> VideoInProgress:
        """Read a job's images and saved progress, on all ranks of the replica."""

        def read_resume_state() -> ResumeState:
            resume_state = self._make_resume_state(job)
            resume_state.plan = job.make_plan_with_images()
            if self.is_first:
                report.record.digest = resume_state.result_digest
            return resume_state

        resume_state = session.run_together(read_resume_state, "read the job's images")
        video = prepare_video(
            session, job.config, resume_state.plan, report, resume_state, quiet=True
        )
        return replace(video, monitor=EventMonitor(self.events, job))

    def wait_for_write(self) -> None:
        """Wait for the video that is being written; raises an error that ends the run."""
        if self.pending_write is not None:
            pending_write, self.pending_write = self.pending_write, None
            pending_write.result()

    def _write_video(
        self, job: PlannedJob, video: VideoInProgress, latents: Tensor, frames: Sequence[Tensor]
    ) -> None:
        """Write a decoded video, in a thread of its own.

        Encoding may take longer than decoding, and needs no GPU.
        """
        try:
            write_decoded_frames(video, latents, frames)
        except Exception as error:
            self.record_failure(job, video.report, error)
        else:
            self.failure_policy.record_success()
            self.finish_job(job, video)

    def finish_job(self, job: PlannedJob, video: VideoInProgress) -> None:
        """Release, count and announce a job that is done, and update the page."""
        add_contact_sheet(video.result_file, video.plan.num_shown_frames)
        self.queue.finish_job(job, "done")
        seconds = round(time.time() - video.report.began, 1)
        step_seconds = video.report.record.step_seconds
        step_text = "" if step_seconds is None else f" ({step_seconds:.2f} s/it)"
        self.events.announce_job(f"{job.name}: {format_duration(seconds)}{step_text}")
        self.events.write_event(
            "done", job=job.name, line=job.source.line, file=str(video.result_file), seconds=seconds
        )
        if self.groups.rank == 0:
            self.run_log.write_page(self.events.compute_progress())

    def record_failure(self, job: PlannedJob, report: StageReport, error: Exception) -> None:
        """Write the error into the job's record; raise it if the other jobs would meet it too."""
        self.failure_policy.record_failure(error)
        if not self.is_first:
            free_memory()
            return
        message = format_message(describe_error(error))
        report.record.status = FAILED
        report.record.error = message
        report.save(self.folder / f"{job.name}.json")
        self.queue.finish_job(job, "failed")
        logger.debug("%s", job.name, exc_info=error)
        self.events.announce_job(f"{job.name} of {job.source.location} FAILED: {message}")
        self.events.write_event("failed", job=job.name, line=job.source.line, error=message)
        free_memory()

    def _summarize_run(self, num_failed_before: int) -> int:
        """Log the summary of the run, and return the exit code."""
        progress = self.events.compute_progress()
        num_failed, num_elsewhere = (
            (progress["failed"] or 0) + num_failed_before,
            self.queue.counters["elsewhere"],
        )
        if self.groups.rank != 0:
            return 0
        parts = [f"{progress['done']} made in {format_duration(time.time() - self.start_time)}"]
        parts += [f"{num_failed} failed; their records say why"] if num_failed else []
        parts += (
            [f"{num_elsewhere} left to another run on the same folder"] if num_elsewhere else []
        )
        logger.info("jobs      %s", ", ".join(parts))
        self.events.write_event("ended")
        return 1 if num_failed else 0


def list_timesteps(job: PlannedJob) -> list[tuple[float, float, bool]]:
    """Return a job's timesteps, each with the next and whether the first frame is known (image to video)."""
    inputs = job.plan.task.inputs
    input_files = list_input_files(read_settings(job.config, Effect.LATENTS))
    has_image = not set(START_KEYS).isdisjoint(input_files)
    first_frames = {has_image, has_image or job.plan.num_clips > 1}
    return [
        (*timesteps, is_known and inputs.has_known_first_frame)
        for is_known in sorted(first_frames)
        for timesteps in job.plan.sampling.schedule.next_timesteps.items()
    ]
