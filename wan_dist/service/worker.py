"""Worker of a service: loads the models once, and makes the video of one request after the other."""

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Never

import torch

from wan_dist.jobs.event_monitor import EventMonitor
from wan_dist.jobs.events import JobEvents
from wan_dist.jobs.planned_job import PlannedJob
from wan_dist.jobs.worker import JobWorker, list_timesteps, make_run_id
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.mesh import make_process_groups, process_group_session, set_group_timeout
from wan_dist.parallel.team import Coordinator
from wan_dist.pipeline.denoise import VideoInProgress
from wan_dist.pipeline.monitor import VideoCancelledError
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.session import Session, find_device
from wan_dist.pipeline.text_embeddings import embed_prompts_ahead
from wan_dist.planning.residency import can_buffer_frames
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import PreemptionInterrupt, preemption
from wan_dist.service.front_process import FrontProcess
from wan_dist.service.request_planner import RequestPlanner
from wan_dist.service.request_queue import RequestQueue
from wan_dist.service.video_files import VideoProgress, make_service_folders

_PROGRESS_SECONDS = 0.2
"""Least time between two writes of a video's progress."""


@torch.no_grad()
def run_service(planner: RequestPlanner, coordinator: Coordinator) -> Never:
    """Make the videos of requests until a signal comes, which raises PreemptionInterrupt.

    Raises InputError for an invalid checkpoint, output folder or address, before weights are read.
    """
    config, default_job = planner.config, planner.plan_defaults()
    device = find_device(config)
    degrees = default_job.plan.degrees
    groups = make_process_groups(degrees, coordinator, device, config.parallel.timeout)
    run_id = coordinator.run_on_first_rank(make_run_id, "begin")
    worker = ServiceWorker(
        config, [default_job], groups, device, run_id, planner.arguments, planner=planner
    )
    try:
        worker.serve()
    finally:
        worker.close()


class ProgressMonitor(EventMonitor):
    """Writes a video's progress for the front, and ends a video whose request was deleted."""

    def __init__(
        self, queue: RequestQueue, job: PlannedJob, run_id: str, events: JobEvents
    ) -> None:
        super().__init__(events, job)
        self._queue, self._video_id = queue, job.name
        self._num_steps = self._steps_per_clip * job.plan.num_clips
        earlier_progress = VideoProgress.read(queue.folder, job.name)
        self._progress = VideoProgress(run_id, round(time.time(), 3))
        if earlier_progress is not None:
            self._progress.num_attempts = earlier_progress.num_attempts + 1
            self._progress.resumed_step = earlier_progress.resumed_step
        self._written_at = 0.0
        self._write()

    def record_resume(self, num_resumed_steps: int) -> None:
        """Count attempts anew where an earlier one has brought the video further."""
        self._progress.step = num_resumed_steps
        if num_resumed_steps > self._progress.resumed_step:
            self._progress.resumed_step, self._progress.num_attempts = num_resumed_steps, 1
        self._write()

    def record_step(self, clip_index: int, num_done: int) -> None:
        """Write the progress, unless it was written just now."""
        self._progress.step = clip_index * self._steps_per_clip + num_done
        is_last = self._progress.step == self._num_steps
        if is_last or time.monotonic() - self._written_at > _PROGRESS_SECONDS:
            self._write()

    def is_cancelled(self) -> bool:
        """Whether the request was deleted."""
        return self._queue.is_deleted(self._video_id)

    def forgive_attempt(self) -> None:
        """Do not count this attempt: the run ends for a reason that is not the video's."""
        self._progress.num_attempts -= 1
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        with suppress(OSError):  # a full disk is noticed where something is lost by it
            self._progress.write(self._queue.folder, self._video_id)


@dataclass
class ServiceWorker(JobWorker):
    """Makes the videos of a service's requests, on one rank."""

    planner: RequestPlanner = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queue = self.requests = RequestQueue(self.groups, self.planner, self._check_idle)
        self.front = FrontProcess(self.planner, self.run_id)
        self.monitor: ProgressMonitor | None = None
        """Of the video that is being made, on the replica's first rank."""

    def serve(self) -> Never:
        """Make videos; see `run_service`."""
        self.open_output()
        self.begin_log(None)
        url = self.coordinator.run_on_first_rank(self._start_front, "start the front")
        logger.info("serve     %s/v1/videos, results in %s", url, self.folder)
        try:
            with process_group_session(self.groups):
                while True:
                    self._make_next_video()
        finally:
            if self.groups.rank == 0:
                self.front.close()
                self.run_log.write_page(self.events.compute_progress(), has_ended=True)

    def _start_front(self) -> str:
        make_service_folders(self.folder)
        return self.front.start()

    def _make_next_video(self) -> None:
        job = self.requests.take_next_job()
        if self.is_first:
            self.monitor = ProgressMonitor(self.requests, job, self.run_id, self.events)
        try:
            self.make_video(job)
        except PreemptionInterrupt:
            if self.monitor is not None and not preemption.has_lost_peer:
                self.monitor.forgive_attempt()
            raise

    def _check_idle(self) -> None:
        """While there is nothing to do: raise what the last video's writing has raised."""
        if self.pending_write is not None and self.pending_write.done():
            self.wait_for_write()
        if self.groups.rank == 0 and self.requests.counters["done"]:
            self.run_log.write_page(self.events.compute_progress())

    def start_video(
        self, job: PlannedJob, session: Session, report: StageReport
    ) -> VideoInProgress:
        """Prepare the session for a video like this one, and the video."""
        set_group_timeout(self.groups, self.config.parallel.load_timeout)
        session.run_together(
            lambda: self._prepare_session(job, session, report), "encode the prompts"
        )
        if not session.has_memory_for_frames:
            self.wait_for_write()
        video = super().start_video(job, session, report)
        if self.monitor is None:
            return video
        self.monitor.record_resume(video.resume_state.num_resumed_steps)
        return replace(video, monitor=self.monitor)

    def _prepare_session(self, job: PlannedJob, session: Session, report: StageReport) -> None:
        """Decide what stays in memory, and encode the texts of this request and of those that wait."""
        session.choose_resident_models(job.plan)
        plan = session.plan_memory(job.plan, quiet=True)
        session.has_memory_for_frames = can_buffer_frames(plan, job.config.output.bytes_per_value)
        session.possible_timesteps = tuple(list_timesteps(job))
        texts = list(job.plan.texts)
        if self.is_first:
            texts += self.requests.list_texts_ahead()
        session.prompt_embeddings = {
            text: embedding
            for text, embedding in session.prompt_embeddings.items()
            if text in texts
        }
        embed_prompts_ahead(session, job.config, plan, texts, report)

    def record_failure(self, job: PlannedJob, report: StageReport, error: Exception) -> None:
        """Record a failure as for any job; of a deleted request nothing stays."""
        if not isinstance(error, VideoCancelledError):
            super().record_failure(job, report, error)
            return
        if self.is_first:
            self.queue.finish_job(job, "cancelled")
            self.events.announce_job(f"{job.name} was deleted: {error}")
            self.events.write_event("cancelled", job=job.name)
        free_memory()
