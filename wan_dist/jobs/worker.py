"""Many videos from a file of jobs: models are loaded once, replicas take the next job each, what is done stays done."""

import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.jobs.events import Events
from wan_dist.jobs.job_file import Job
from wan_dist.jobs.run_log import Chronicle, add_sheet
from wan_dist.output.locks import DONE, FAILED, Ledger
from wan_dist.output.output_check import check_output, outcome_of
from wan_dist.output.record import described
from wan_dist.output.stage_report import Report
from wan_dist.parallel.mesh import Groups, limit_waiting, make_groups, opened
from wan_dist.parallel.shared_counters import Counts
from wan_dist.parallel.shared_work import kind_of, text_of
from wan_dist.parallel.team import RankError, Team
from wan_dist.pipeline.denoise import Video, make_latents
from wan_dist.pipeline.generate import begin, complete, complete_later, decode_first
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.resume import Kept, warn_of_older
from wan_dist.pipeline.session import Session, find_device, open_session
from wan_dist.pipeline.text_embeddings import embed_ahead, share_texts
from wan_dist.planning.plan import Plan, make_plan
from wan_dist.planning.residency import experts_stay, frames_wait, models_stay
from wan_dist.planning.workload import FLOAT
from wan_dist.runtime.durations import duration
from wan_dist.runtime.errors import InputError, told
from wan_dist.runtime.log import announce_here, keep_log, logger
from wan_dist.sampling.solvers import make_solver

_MOST_FAILURES = 10
"""In a row, until a run is given up: something is wrong with more than the jobs."""


_TEXTS = ".texts"
"""Folder of prompts' embeddings, in the output folder, which all replicas see."""


@dataclass(frozen=True)
class Item:
    """A job that has been checked."""

    job: Job
    config: RunConfig
    plan: Plan
    """Without the images, which are read again when it is made."""

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return self.plan.name

    @property
    def models(self) -> str:
        """What the models depend on that are loaded for it."""
        config = self.config
        return repr(
            (config.task, config.ckpt_dir, config.dit_file, config.dtype, config.quant, config.attention, config.memory, config.fsdp)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """What kernels may be compiled for."""
        return (self.plan.width, self.plan.height, self.plan.frame_num)

    def planned(self) -> Plan:
        """Return the plan with its images."""
        has_images = any(file is not None for file in (self.config.image, self.config.first_frame, self.config.last_frame))
        return make_plan(self.config, is_job=True) if has_images else self.plan


def in_order(items: Iterable[Item]) -> list[Item]:
    """Return jobs of the same models together, and among them those of the same shape, each in the order they are in."""
    models: dict[str, dict[tuple[int, ...], list[Item]]] = {}
    for item in items:
        models.setdefault(item.models, {}).setdefault(item.shape, []).append(item)
    return [item for shapes in models.values() for together in shapes.values() for item in together]


@torch.no_grad()
def run_jobs(config: RunConfig, items: Sequence[Item], arguments: Sequence[str], team: Team) -> int:
    """Make all jobs that are not done, and return the exit code: 1 if some have failed.

    ``config`` is the run's own, without a job's, ``arguments`` are those of its command. Raises InputError for what is wrong with a
    checkpoint or the output folder, before weights are read.
    """
    device = find_device(config)
    groups = make_groups(items[0].plan.degrees, team, device, config.parallel.timeout)
    run_id = team.share(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}", "begin")
    batch = Batch(config, in_order(items), groups, device, run_id, arguments)
    try:
        return batch.run()
    finally:
        batch.close()


@dataclass
class Batch:
    """A run of jobs, on one rank."""

    config: RunConfig
    items: list[Item]
    groups: Groups
    device: torch.device
    run_id: str
    arguments: Sequence[str]
    began: float = field(default_factory=time.time)
    sessions: dict[str, Session] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    failures_in_a_row: int = 0
    pending: Future[None] | None = None
    """The video that is written while the next one is denoised."""

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output.dir).expanduser()
        self.is_first = self.groups.replica.rank == 0
        self.team = self.groups.team
        self.counts = Counts(self.team)
        self.report = Report(self.config, self.device)
        self.ledger = Ledger(self.folder)

    def run(self) -> int:
        """Make the jobs; see `run_jobs`."""
        if self.groups.rank == 0:
            check_output(self.folder, [outcome_of(item.plan, keeps_tensor=item.config.output.save_tensor) for item in self.items])
            warn_of_older(self.folder)
        self._open_sessions()
        if self.team.num_ranks > 1:
            keep_log(self.folder / "logs" / self.run_id)
        if self.is_first:
            announce_here()
        self._check_folder()
        before = self.team.share(self._before, "look for what is done")
        is_open = {None, FAILED} if self.config.retry_failed else {None}
        todo = [item for item, outcome in zip(self.items, before, strict=True) if outcome in is_open]
        self._say_what_is_left(before, len(todo))
        self.chronicle = Chronicle(self.folder, self.run_id, self.arguments, self.team.num_ranks, len(todo), self.report.stages)
        self.events = Events(self.config.output.events, len(todo), self.counts)
        failed_before = 0 if self.config.retry_failed else before.count(FAILED)
        if not todo:
            return self._conclude(failed_before)
        with opened(self.groups):
            limit_waiting(self.groups, self.config.parallel.load_timeout)
            self._prepare(todo)
            limit_waiting(self.groups, self.config.parallel.timeout)
            try:
                while (item := self._next(todo)) is not None:
                    self._make(item)
                self._settle()
                self._await_others()
            finally:
                if self.groups.rank == 0:
                    self.chronicle.write(self.events.standing(), ended=True)
        return self._conclude(failed_before)

    def _await_others(self) -> None:
        """Have the first rank wait for all replicas: it says how the run went."""
        if self.is_first:
            self.counts.add("ended")
        if self.groups.rank == 0:
            firsts = range(0, self.team.num_ranks, self.groups.replica.size)
            self.team.wait(lambda: self.counts["ended"] == self.groups.dp.size, "make their jobs", firsts)

    def _check_folder(self) -> None:
        """Raise InputError if a replica does not see the first rank's folder: its jobs would all fail, or be made twice."""
        if self.groups.rank == 0:
            self.ledger.lock_probe()
        hosts = self.team.gather(socket.gethostname(), "open the output folder")
        if self.is_first and not self.ledger.is_seen():
            raise InputError(
                f"output.dir={self.folder} of the first rank is not seen on {socket.gethostname()}; take one that all nodes share"
            )
        is_first_of_host = hosts.index(hosts[self.groups.rank]) == self.groups.rank
        if self.groups.rank and is_first_of_host and self.ledger.lock_probe():
            logger.warning("%s: locks hold on one node only: let no second run use it at the same time", self.folder)
        self.team.gather(None, "try the output folder's locks")
        self.ledger.unlock_probe()

    def close(self) -> None:
        """Wait for the video that is being written, if any."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.ledger.close()

    def _open_sessions(self) -> None:
        for item in self.items:
            if item.models not in self.sessions:
                with self.report.stage("check", f"{item.config.task}, output {self.folder}"):
                    session = open_session(item.config, item.plan, self.groups, self.device)
                    session.shelf = Shelf(keeps=True)
                    self.sessions[item.models] = session

    def _kept(self, item: Item) -> Kept:
        return Kept(self.folder, item.config, item.plan, self.sessions[item.models].digests, is_job=True, ledger=self.ledger)

    def _outcome(self, item: Item) -> str | None:
        """Return what has become of a job in earlier runs."""
        try:
            return self.ledger.outcome(item.name, self._kept(item).digest)
        except InputError:  # an image is gone: it fails when it is to be made
            return None

    def _before(self) -> list[str | None]:
        """Return what has become of each job in earlier runs."""
        found = [self._outcome(item) for item in self.items]
        if self.ledger.num_older:
            logger.info("note      %d records are of an earlier version of wan-dist: their jobs are made again", self.ledger.num_older)
        return found

    def _say_what_is_left(self, before: Sequence[str | None], num_left: int) -> None:
        parts = [f"{before.count(DONE)} done before"] if DONE in before else []
        if FAILED in before:
            hint = "made again" if self.config.retry_failed else "retry_failed=true makes them again"
            parts.append(f"{before.count(FAILED)} failed before ({hint})")
        dp, size = self.groups.dp.size, self.groups.replica.size
        how = f" on {dp} replicas of {size} rank{'s' if size > 1 else ''}" if dp > 1 else f" on {size} ranks" if size > 1 else ""
        logger.info("jobs      %d: %s", len(before), ", ".join([*parts, f"{num_left} to make{how}"]))

    def _prepare(self, todo: Sequence[Item]) -> None:
        """Find out what models may stay, and embed all texts: each replica its share."""
        for models, session in self.sessions.items():
            items = [item for item in todo if item.models == models and item.config.latents is None]
            if not items:
                continue
            largest = max(items, key=lambda item: item.plan.num_tokens)
            session.shelf.keeps = False
            plan = session.arrange(largest.plan, largest.config, quiet=True)
            session.keeps_experts = experts_stay(plan)
            session.shelf.keeps = models_stay(plan)
            plan = session.arrange(largest.plan, largest.config)
            self.chronicle.plans.append(plan)
            session.has_room_for_frames = frames_wait(plan, FLOAT if any(item.config.output.save_tensor for item in items) else 1)
            session.times = tuple(dict.fromkeys(time for item in items for time in _times(item)))
            texts = sorted({text for item in items for text in (item.plan.prompt, item.plan.negative_prompt) if text is not None})
            share = texts[self.groups.dp.rank :: self.groups.dp.size]
            session.together(lambda: embed_ahead(session, largest.config, plan, share, self.report), "encode the prompts")  # noqa: B023
            share_texts(session, texts, self.folder / _TEXTS)

    def _next(self, todo: Sequence[Item]) -> Item | None:
        """Return the next job that nobody is at, None after the last; the same on all ranks of the replica."""
        index = self.groups.share(lambda: self._take(todo), "take the next job")
        return None if index is None else todo[index]

    def _take(self, todo: Sequence[Item]) -> int | None:
        while (index := self.counts.add("next") - 1) < len(todo):
            item = todo[index]
            if self.ledger.lock(item.name):
                if self._outcome(item) != DONE:
                    return index
                self.ledger.unlock(item.name)
            self.counts.add("elsewhere")  # another run is at it, or has made it meanwhile
        return None

    def _make(self, item: Item) -> None:
        """Make one job; what goes wrong with it alone ends in its record, the same on all ranks of the replica."""
        session = self.sessions[item.models]
        for models, other in self.sessions.items():
            if models != item.models:
                other.shelf.clear()
        report = Report(item.config, self.device, quiet=True)
        report.facts |= described(item.config, item.plan) | {"run": self.run_id, "job": {"file": str(item.job.file), "line": item.job.line}}
        report.facts["rank"] = self.groups.rank
        if self.is_first:
            self.events.tell("begun", job=item.name, line=item.job.line)
        if not session.has_room_for_frames:
            self._settle()
        frames: list[Tensor] = []
        try:
            video = self._begin(item, session, report)
            latents = make_latents(video)
            if session.has_room_for_frames:
                frames = decode_first(video, latents)
            else:
                complete(video, latents)
        except Exception as fault:
            self._settle()
            self._failed(item, report, fault)
            return
        if not (self.is_first and session.has_room_for_frames):
            self.failures_in_a_row = 0
        self._settle()
        if self.is_first and session.has_room_for_frames:
            self.pending = self.pool.submit(self._write, item, video, latents, frames)
        elif self.is_first:
            self._done(item, video)

    def _begin(self, item: Item, session: Session, report: Report) -> Video:
        def plan() -> Kept:
            kept = self._kept(item)
            kept.plan = item.planned()
            if self.is_first:
                report.facts["digest"] = kept.digest
            return kept

        kept = session.together(plan, "read the job's images")
        return begin(session, item.config, kept.plan, report, kept, quiet=True)

    def _settle(self) -> None:
        """Wait for the video that is being written; raises what should end the run."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def _write(self, item: Item, video: Video, latents: Tensor, frames: Sequence[Tensor]) -> None:
        """Write a video that is decoded, in a thread of its own: encoding it may take longer than decoding, and no GPU."""
        try:
            complete_later(video, latents, frames)
        except Exception as fault:
            self._failed(item, video.report, fault)
        else:
            self.failures_in_a_row = 0
            self._done(item, video)

    def _done(self, item: Item, video: Video) -> None:
        add_sheet(video.result, video.plan.frame_num)
        self.ledger.unlock(item.name)
        self.counts.add("done")
        facts = video.report.facts
        seconds = round(time.time() - facts["began"], 1)
        each = f" ({facts['step_seconds']:.2f} s/it)" if "step_seconds" in facts else ""
        self.events.announce(f"{item.name}: {duration(seconds)}{each}")
        self.events.tell("done", job=item.name, line=item.job.line, file=str(video.result), seconds=seconds)
        if self.groups.rank == 0:
            self.chronicle.write(self.events.standing())

    def _failed(self, item: Item, report: Report, fault: Exception) -> None:
        """Write the error into the job's record; raises it if the other jobs would meet it too."""
        if not isinstance(fault, InputError):
            self.failures_in_a_row += 1
        is_final = isinstance(fault, RankError) and fault.is_final
        if is_final or kind_of(fault) == "machine" or self.failures_in_a_row == _MOST_FAILURES:
            if self.failures_in_a_row == _MOST_FAILURES:
                fault.add_note(f"the last of {_MOST_FAILURES} jobs that failed one after the other")
            raise fault
        if not self.is_first:
            free_memory()
            return
        message = told(text_of(fault))
        report.facts |= {"status": FAILED, "error": message}
        report.save(self.folder / f"{item.name}.json")
        self.ledger.unlock(item.name)
        self.counts.add("failed")
        logger.debug("%s", item.name, exc_info=fault)
        self.events.announce(f"{item.name} of {item.job.place} FAILED: {message}")
        self.events.tell("failed", job=item.name, line=item.job.line, error=message)
        free_memory()

    def _conclude(self, failed_before: int) -> int:
        """Say how it went."""
        standing = self.events.standing()
        failed, elsewhere = (standing["failed"] or 0) + failed_before, self.counts["elsewhere"]
        if self.groups.rank != 0:
            return 0
        parts = [f"{standing['done']} made in {duration(time.time() - self.began)}"]
        parts += [f"{failed} failed; their records say why"] if failed else []
        parts += [f"{elsewhere} left to another run on the same folder"] if elsewhere else []
        logger.info("jobs      %s", ", ".join(parts))
        self.events.tell("ended")
        return 1 if failed else 0


def _times(item: Item) -> list[tuple[int, bool]]:
    """Return a job's timesteps, and whether with a known first frame."""
    has_known = item.plan.task.known_first_frame and item.config.image is not None
    solver = make_solver(item.config.sample.solver, item.config.sample.steps, item.plan.shift)
    return [(timestep, has_known) for timestep in solver.timesteps]
