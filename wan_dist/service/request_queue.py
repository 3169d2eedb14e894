"""Queue of a service on one rank: a replica takes the next request, and waits for one while there is none."""

import time
from collections.abc import Callable

from wan_dist.config.checks import PROMPT_KEYS
from wan_dist.jobs.planned_job import PlannedJob
from wan_dist.jobs.queue import JobQueue
from wan_dist.output.record import FAILED, VideoRecord
from wan_dist.parallel.mesh import ProcessGroups
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.runtime.log import logger
from wan_dist.service.request_log import RequestLog, VideoRequest
from wan_dist.service.request_planner import RequestPlanner
from wan_dist.service.video_files import VideoProgress, read_final_record, remove_video

_POLL_SECONDS = 0.2
"""Seconds between two looks at the request log, on the first rank of an idle replica."""
_MAX_ATTEMPTS = 3
"""Runs that a video may end in the middle of it, without a signal, before it counts as failed."""
_MAX_TEXTS_AHEAD = 32
"""Waiting requests whose texts are encoded together."""


class RequestQueue(JobQueue):
    """The requests of a service, which grow in number while the ranks work.

    The first rank of a replica reads the log. The others wait for it on the ranks' store, however long, and
    not in a collective. ``check_idle`` is called again and again while there is nothing to do.
    """

    def __init__(
        self, groups: ProcessGroups, planner: RequestPlanner, check_idle: Callable[[], None]
    ) -> None:
        super().__init__(groups, planner.output_folder, [], lambda _: "")
        self.log = RequestLog(planner.output_folder)
        self._planner, self._check_idle = planner, check_idle
        self._settled_ids: set[str] = set()
        """Requests that this rank need not look at again: taken, finished or deleted."""
        self._foreign_tasks: set[str] = set()
        self._next_poll_time = 0.0

    def take_next_job(self) -> PlannedJob:
        """Return the next request's job, the same on all ranks of the replica; waits for one."""
        return self.groups.run_on_first_rank(self._wait_for_job, "take the next request")

    def _wait_for_job(self) -> PlannedJob:
        taken_jobs: list[PlannedJob] = []

        def try_to_take() -> bool:
            if time.monotonic() < self._next_poll_time:
                return False
            self._check_idle()
            taken_jobs.extend(self._take_job())
            self._next_poll_time = 0.0 if taken_jobs else time.monotonic() + _POLL_SECONDS
            return bool(taken_jobs)

        self.groups.coordinator.wait_until(
            try_to_take, "take the next request", self.groups.replica_ranks
        )
        return taken_jobs[0]

    def list_texts_ahead(self) -> list[str]:
        """Return the texts of requests that wait, which are encoded together with those of a job."""
        texts = [
            request.values.get(key)
            for request in self._list_waiting()[:_MAX_TEXTS_AHEAD]
            for key in PROMPT_KEYS
        ]
        return [text.removeprefix("@") for text in texts if text]

    def is_deleted(self, video_id: str) -> bool:
        """Whether a request was deleted."""
        self.log.read_new()
        return video_id in self.log.deleted_ids

    def finish_job(self, job: PlannedJob, outcome: str) -> None:
        """Release and count a job; the files of a deleted one are removed first."""
        if self.is_deleted(job.name):
            remove_video(self.folder, job.name)
        super().finish_job(job, outcome)

    def _take_job(self) -> list[PlannedJob]:
        """Return the job of the first request that no rank has or has had, none where there is none."""
        self.log.read_new()
        for request in self._list_waiting():
            if request.task != self._planner.task.name:
                self._leave_foreign_request(request)
            elif self.locks.acquire(request.id):
                job = self._claim_job(request)
                self._settled_ids.add(request.id)
                if job is not None:
                    return [job]
                self.locks.release(request.id)
        return []

    def _list_waiting(self) -> list[VideoRequest]:
        requests = list(self.log.requests.values())
        return [request for request in requests if request.id not in self._settled_ids]

    def _claim_job(self, request: VideoRequest) -> PlannedJob | None:
        """Return the job of a locked request, None if there is nothing to make."""
        # beside the lock, for file systems that have none
        is_first_claim = self.counters.add(f"claims of {request.id}") == 1
        if not is_first_claim or self.is_deleted(request.id):
            return None
        if read_final_record(self.locks, request.id) is not None:
            return None
        try:
            self._check_attempts(request)
            return self._planner.plan_request(request)
        except InputError as error:
            self._record_failure(request, error)
            return None

    def _check_attempts(self, request: VideoRequest) -> None:
        """Raise InputError for a video that has ended several runs: it would end this one too."""
        progress = VideoProgress.read(self.folder, request.id)
        if progress is not None and progress.num_attempts >= _MAX_ATTEMPTS:
            raise InputError(
                f"{progress.num_attempts} runs of the service have ended while they made this video"
            )

    def _record_failure(self, request: VideoRequest, error: InputError) -> None:
        record = VideoRecord()
        record.name, record.began = request.id, round(time.time(), 3)
        record.status, record.error = FAILED, format_message(error)
        record.write(self.folder / f"{request.id}.json")
        self.counters.add("failed")
        logger.warning("%s FAILED: %s", request.id, record.error)

    def _leave_foreign_request(self, request: VideoRequest) -> None:
        self._settled_ids.add(request.id)
        if request.task not in self._foreign_tasks:
            self._foreign_tasks.add(request.task)
            logger.warning(
                "requests for task=%s are in the queue and wait for a service of that task",
                request.task,
            )
