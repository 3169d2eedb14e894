"""Many videos from a file of jobs: models are loaded once, replicas take the next job each, what is done stays done."""

import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.jobs.events import JobEvents
from wan_dist.jobs.job_file import Job
from wan_dist.jobs.run_log import RunLog, add_contact_sheet
from wan_dist.output.locks import DONE, FAILED, ResultLocks
from wan_dist.output.output_check import check_output_folder, estimate_output
from wan_dist.output.record import describe_video
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.mesh import (
    ProcessGroups,
    make_process_groups,
    process_group_session,
    set_group_timeout,
)
from wan_dist.parallel.shared_counters import SharedCounters
from wan_dist.parallel.shared_work import classify_error, describe_error
from wan_dist.parallel.team import Coordinator, RankError
from wan_dist.pipeline.denoise import VideoInProgress, make_latents
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
from wan_dist.planning.plan import Plan, make_plan
from wan_dist.planning.residency import can_buffer_frames, can_keep_experts, can_keep_models
from wan_dist.planning.workload import FLOAT_BYTES
from wan_dist.runtime.durations import format_duration
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.runtime.log import add_log_file, logger, show_announcements
from wan_dist.sampling.solvers import make_solver

_MAX_CONSECUTIVE_FAILURES = 10
"""In a row, until a run is given up: something is wrong with more than the jobs."""


_EMBEDDINGS_FOLDER = ".texts"
"""Folder of prompts' embeddings, in the output folder, which all replicas see."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that has been checked."""

    source: Job
    config: RunConfig
    plan: Plan
    """Without the images, which are read again when it is made."""

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return self.plan.name

    @property
    def model_key(self) -> str:
        """What the models depend on that are loaded for it."""
        config = self.config
        return repr(
            (
                config.task,
                config.ckpt_dir,
                config.dit_file,
                config.dtype,
                config.quant,
                config.attention,
                config.memory,
                config.fsdp,
            )
        )

    @property
    def video_shape(self) -> tuple[int, ...]:
        """What kernels may be compiled for."""
        return (self.plan.width, self.plan.height, self.plan.frame_num)

    def make_plan_with_images(self) -> Plan:
        """Return the plan with its images."""
        has_images = any(
            file is not None
            for file in (self.config.image, self.config.first_frame, self.config.last_frame)
        )
        return make_plan(self.config, is_job=True) if has_images else self.plan


def sort_by_model(jobs: Iterable[PlannedJob]) -> list[PlannedJob]:
    """Return jobs of the same models together, and among them those of the same shape, each in the order they are in."""
    jobs_by_model: dict[str, dict[tuple[int, ...], list[PlannedJob]]] = {}
    for job in jobs:
        jobs_by_model.setdefault(job.model_key, {}).setdefault(job.video_shape, []).append(job)
    return [
        job
        for jobs_by_shape in jobs_by_model.values()
        for same_shape_jobs in jobs_by_shape.values()
        for job in same_shape_jobs
    ]


@torch.no_grad()
def run_jobs(
    config: RunConfig,
    jobs: Sequence[PlannedJob],
    arguments: Sequence[str],
    coordinator: Coordinator,
) -> int:
    """Make all jobs that are not done, and return the exit code: 1 if some have failed.

    ``config`` is the run's own, without a job's, ``arguments`` are those of its command. Raises InputError for what is wrong with a
    checkpoint or the output folder, before weights are read.
    """
    device = find_device(config)
    groups = make_process_groups(jobs[0].plan.degrees, coordinator, device, config.parallel.timeout)
    run_id = coordinator.run_on_first_rank(
        lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}", "begin"
    )
    job_worker = JobWorker(config, sort_by_model(jobs), groups, device, run_id, arguments)
    try:
        return job_worker.run()
    finally:
        job_worker.close()


@dataclass
class JobWorker:
    """A run of jobs, on one rank."""

    config: RunConfig
    jobs: list[PlannedJob]
    groups: ProcessGroups
    device: torch.device
    run_id: str
    arguments: Sequence[str]
    start_time: float = field(default_factory=time.time)
    sessions: dict[str, Session] = field(default_factory=dict)
    write_executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    num_consecutive_failures: int = 0
    pending_write: Future[None] | None = None
    """The video that is written while the next one is denoised."""

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output.dir).expanduser()
        self.is_first = self.groups.replica.rank == 0
        self.coordinator = self.groups.coordinator
        self.counters = SharedCounters(self.coordinator)
        self.report = StageReport(self.config, self.device)
        self.locks = ResultLocks(self.folder)

    def run(self) -> int:
        """Make the jobs; see `run_jobs`."""
        if self.groups.rank == 0:
            check_output_folder(
                self.folder,
                [
                    estimate_output(job.plan, saves_tensor=job.config.output.save_tensor)
                    for job in self.jobs
                ],
            )
            warn_about_old_states(self.folder)
        self._open_sessions()
        if self.coordinator.num_ranks > 1:
            add_log_file(self.folder / "logs" / self.run_id)
        if self.is_first:
            show_announcements()
        self._check_shared_folder()
        outcomes = self.coordinator.run_on_first_rank(
            self._read_all_outcomes, "look for what is done"
        )
        remaining_outcomes = {None, FAILED} if self.config.retry_failed else {None}
        remaining_jobs = [
            job
            for job, outcome in zip(self.jobs, outcomes, strict=True)
            if outcome in remaining_outcomes
        ]
        self._log_remaining_jobs(outcomes, len(remaining_jobs))
        self.run_log = RunLog(
            self.folder,
            self.run_id,
            self.arguments,
            self.coordinator.num_ranks,
            len(remaining_jobs),
            self.report.stages,
        )
        self.events = JobEvents(self.config.output.events, len(remaining_jobs), self.counters)
        num_failed_before = 0 if self.config.retry_failed else outcomes.count(FAILED)
        if not remaining_jobs:
            return self._summarize_run(num_failed_before)
        with process_group_session(self.groups):
            set_group_timeout(self.groups, self.config.parallel.load_timeout)
            self._prepare_sessions(remaining_jobs)
            set_group_timeout(self.groups, self.config.parallel.timeout)
            try:
                while (job := self._take_next_job(remaining_jobs)) is not None:
                    self._make_video(job)
                self._wait_for_write()
                self._wait_for_replicas()
            finally:
                if self.groups.rank == 0:
                    self.run_log.write_page(self.events.compute_progress(), has_ended=True)
        return self._summarize_run(num_failed_before)

    def _wait_for_replicas(self) -> None:
        """Have the first rank wait for all replicas: it says how the run went."""
        if self.is_first:
            self.counters.add("ended")
        if self.groups.rank == 0:
            first_ranks = range(0, self.coordinator.num_ranks, self.groups.replica.size)
            self.coordinator.wait_until(
                lambda: self.counters["ended"] == self.groups.dp.size,
                "make their jobs",
                first_ranks,
            )

    def _check_shared_folder(self) -> None:
        """Raise InputError if a replica does not see the first rank's folder: its jobs would all fail, or be made twice."""
        if self.groups.rank == 0:
            self.locks.acquire_probe()
        hosts = self.coordinator.gather(socket.gethostname(), "open the output folder")
        if self.is_first and not self.locks.is_visible():
            raise InputError(
                f"output.dir={self.folder} of the first rank is not seen on {socket.gethostname()}; take one that all nodes share"
            )
        is_first_of_host = hosts.index(hosts[self.groups.rank]) == self.groups.rank
        if self.groups.rank and is_first_of_host and self.locks.acquire_probe():
            logger.warning(
                "%s: locks hold on one node only: let no second run use it at the same time",
                self.folder,
            )
        self.coordinator.gather(None, "try the output folder's locks")
        self.locks.release_probe()

    def close(self) -> None:
        """Wait for the video that is being written, if any."""
        self.write_executor.shutdown(wait=True, cancel_futures=True)
        self.locks.close()

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
            locks=self.locks,
        )

    def _read_outcome(self, job: PlannedJob) -> str | None:
        """Return what has become of a job in earlier runs."""
        try:
            return self.locks.read_outcome(job.name, self._make_resume_state(job).result_digest)
        except InputError:  # an image is gone: it fails when it is to be made
            return None

    def _read_all_outcomes(self) -> list[str | None]:
        """Return what has become of each job in earlier runs."""
        outcomes = [self._read_outcome(job) for job in self.jobs]
        if self.locks.num_older_records:
            logger.info(
                "note      %d records are of an earlier version of wan-dist: their jobs are made again",
                self.locks.num_older_records,
            )
        return outcomes

    def _log_remaining_jobs(self, outcomes: Sequence[str | None], num_remaining: int) -> None:
        parts = [f"{outcomes.count(DONE)} done before"] if DONE in outcomes else []
        if FAILED in outcomes:
            hint = (
                "made again" if self.config.retry_failed else "retry_failed=true makes them again"
            )
            parts.append(f"{outcomes.count(FAILED)} failed before ({hint})")
        num_replicas, replica_size = self.groups.dp.size, self.groups.replica.size
        replicas_text = (
            f" on {num_replicas} replicas of {replica_size} rank{'s' if replica_size > 1 else ''}"
            if num_replicas > 1
            else f" on {replica_size} ranks"
            if replica_size > 1
            else ""
        )
        logger.info(
            "jobs      %d: %s",
            len(outcomes),
            ", ".join([*parts, f"{num_remaining} to make{replicas_text}"]),
        )

    def _prepare_sessions(self, remaining_jobs: Sequence[PlannedJob]) -> None:
        """Find out what models may stay, and embed all texts: each replica its share."""
        for model_key, session in self.sessions.items():
            jobs = [
                job
                for job in remaining_jobs
                if job.model_key == model_key and job.config.latents is None
            ]
            if not jobs:
                continue
            largest_job = max(jobs, key=lambda job: job.plan.num_tokens)
            session.model_cache.is_persistent = False
            plan = session.plan_memory(largest_job.plan, largest_job.config, quiet=True)
            session.keeps_both_experts = can_keep_experts(plan)
            session.model_cache.is_persistent = can_keep_models(plan)
            plan = session.plan_memory(largest_job.plan, largest_job.config)
            self.run_log.plans.append(plan)
            session.has_memory_for_frames = can_buffer_frames(
                plan, FLOAT_BYTES if any(job.config.output.save_tensor for job in jobs) else 1
            )
            session.possible_timesteps = tuple(
                dict.fromkeys(timestep for job in jobs for timestep in _list_timesteps(job))
            )
            texts = sorted(
                {
                    text
                    for job in jobs
                    for text in (job.plan.prompt, job.plan.negative_prompt)
                    if text is not None
                }
            )
            text_shard = texts[self.groups.dp.rank :: self.groups.dp.size]
            embed = partial(
                embed_prompts_ahead, session, largest_job.config, plan, text_shard, self.report
            )
            session.run_together(embed, "encode the prompts")
            share_prompt_embeddings(session, texts, self.folder / _EMBEDDINGS_FOLDER)

    def _take_next_job(self, remaining_jobs: Sequence[PlannedJob]) -> PlannedJob | None:
        """Return the next job that nobody is at, None after the last; the same on all ranks of the replica."""
        index = self.groups.run_on_first_rank(
            lambda: self._lock_next_job(remaining_jobs), "take the next job"
        )
        return None if index is None else remaining_jobs[index]

    def _lock_next_job(self, remaining_jobs: Sequence[PlannedJob]) -> int | None:
        while (index := self.counters.add("next") - 1) < len(remaining_jobs):
            job = remaining_jobs[index]
            if self.locks.acquire(job.name):
                if self._read_outcome(job) != DONE:
                    return index
                self.locks.release(job.name)
            self.counters.add("elsewhere")  # another run is at it, or has made it meanwhile
        return None

    def _make_video(self, job: PlannedJob) -> None:
        """Make one job; what goes wrong with it alone ends in its record, the same on all ranks of the replica."""
        session = self.sessions[job.model_key]
        for model_key, other_session in self.sessions.items():
            if model_key != job.model_key:
                other_session.model_cache.clear()
        report = StageReport(job.config, self.device, quiet=True)
        report.metadata |= describe_video(job.config, job.plan) | {
            "run": self.run_id,
            "job": {"file": str(job.source.file), "line": job.source.line},
        }
        report.metadata["rank"] = self.groups.rank
        if self.is_first:
            self.events.write_event("begun", job=job.name, line=job.source.line)
        if not session.has_memory_for_frames:
            self._wait_for_write()
        frames: list[Tensor] = []
        try:
            video = self._start_video(job, session, report)
            latents = make_latents(video)
            if session.has_memory_for_frames:
                frames = decode_to_host(video, latents)
            else:
                decode_and_write(video, latents)
        except Exception as error:
            self._wait_for_write()
            self._record_failure(job, report, error)
            return
        if not (self.is_first and session.has_memory_for_frames):
            self.num_consecutive_failures = 0
        self._wait_for_write()
        if self.is_first and session.has_memory_for_frames:
            self.pending_write = self.write_executor.submit(
                self._write_video, job, video, latents, frames
            )
        elif self.is_first:
            self._finish_job(job, video)

    def _start_video(
        self, job: PlannedJob, session: Session, report: StageReport
    ) -> VideoInProgress:
        def read_resume_state() -> ResumeState:
            resume_state = self._make_resume_state(job)
            resume_state.plan = job.make_plan_with_images()
            if self.is_first:
                report.metadata["digest"] = resume_state.result_digest
            return resume_state

        resume_state = session.run_together(read_resume_state, "read the job's images")
        return prepare_video(
            session, job.config, resume_state.plan, report, resume_state, quiet=True
        )

    def _wait_for_write(self) -> None:
        """Wait for the video that is being written; raises what should end the run."""
        if self.pending_write is not None:
            pending_write, self.pending_write = self.pending_write, None
            pending_write.result()

    def _write_video(
        self, job: PlannedJob, video: VideoInProgress, latents: Tensor, frames: Sequence[Tensor]
    ) -> None:
        """Write a video that is decoded, in a thread of its own: encoding it may take longer than decoding, and no GPU."""
        try:
            write_decoded_frames(video, latents, frames)
        except Exception as error:
            self._record_failure(job, video.report, error)
        else:
            self.num_consecutive_failures = 0
            self._finish_job(job, video)

    def _finish_job(self, job: PlannedJob, video: VideoInProgress) -> None:
        add_contact_sheet(video.result_file, video.plan.frame_num)
        self.locks.release(job.name)
        self.counters.add("done")
        metadata = video.report.metadata
        seconds = round(time.time() - metadata["began"], 1)
        step_text = f" ({metadata['step_seconds']:.2f} s/it)" if "step_seconds" in metadata else ""
        self.events.announce_job(f"{job.name}: {format_duration(seconds)}{step_text}")
        self.events.write_event(
            "done", job=job.name, line=job.source.line, file=str(video.result_file), seconds=seconds
        )
        if self.groups.rank == 0:
            self.run_log.write_page(self.events.compute_progress())

    def _record_failure(self, job: PlannedJob, report: StageReport, error: Exception) -> None:
        """Write the error into the job's record; raises it if the other jobs would meet it too."""
        if not isinstance(error, InputError):
            self.num_consecutive_failures += 1
        is_final = isinstance(error, RankError) and error.is_final
        if (
            is_final
            or classify_error(error) == "machine"
            or self.num_consecutive_failures == _MAX_CONSECUTIVE_FAILURES
        ):
            if self.num_consecutive_failures == _MAX_CONSECUTIVE_FAILURES:
                error.add_note(
                    f"the last of {_MAX_CONSECUTIVE_FAILURES} jobs that failed one after the other"
                )
            raise error
        if not self.is_first:
            free_memory()
            return
        message = format_message(describe_error(error))
        report.metadata |= {"status": FAILED, "error": message}
        report.save(self.folder / f"{job.name}.json")
        self.locks.release(job.name)
        self.counters.add("failed")
        logger.debug("%s", job.name, exc_info=error)
        self.events.announce_job(f"{job.name} of {job.source.location} FAILED: {message}")
        self.events.write_event("failed", job=job.name, line=job.source.line, error=message)
        free_memory()

    def _summarize_run(self, num_failed_before: int) -> int:
        """Say how it went."""
        progress = self.events.compute_progress()
        num_failed, num_elsewhere = (
            (progress["failed"] or 0) + num_failed_before,
            self.counters["elsewhere"],
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


def _list_timesteps(job: PlannedJob) -> list[tuple[int, bool]]:
    """Return a job's timesteps, and whether with a known first frame."""
    has_known_frame = job.plan.task.has_fixed_first_frame and job.config.image is not None
    solver = make_solver(job.config.sample.solver, job.config.sample.steps, job.plan.shift)
    return [(timestep, has_known_frame) for timestep in solver.timesteps]
