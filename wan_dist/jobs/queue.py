"""Job queue of a batch run: which jobs are done, and which one a replica takes next.

Several runs may share one output folder: each job is locked in it while it is made.
"""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_dist.jobs.planned_job import PlannedJob
from wan_dist.output.locks import ResultLocks
from wan_dist.output.record import DONE, FAILED
from wan_dist.parallel.mesh import ProcessGroups
from wan_dist.parallel.shared_counters import SharedCounters
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger


class JobQueue:
    """The jobs of a run, on one rank.

    ``compute_digest`` returns the digest of all that a job's result depends on.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        folder: Path,
        jobs: Sequence[PlannedJob],
        compute_digest: Callable[[PlannedJob], str],
    ) -> None:
        self.groups = groups
        self.folder = folder
        self.jobs = jobs
        self.remaining_jobs: list[PlannedJob] = []
        self.counters = SharedCounters(groups.coordinator)
        self.locks = ResultLocks(folder)
        self._compute_digest = compute_digest

    def check_shared_folder(self) -> None:
        """Raise InputError if a replica does not see the first rank's output folder.

        Its jobs would all fail, or be made twice.
        """
        groups, coordinator = self.groups, self.groups.coordinator
        if groups.rank == 0:
            self.locks.acquire_probe()
        hosts = coordinator.gather(socket.gethostname(), "open the output folder")
        if groups.replica.rank == 0 and not self.locks.is_visible():
            raise InputError(
                f"output.dir={self.folder} is not visible on {socket.gethostname()}; "
                "use a folder on a shared file system"
            )
        is_first_of_host = hosts.index(hosts[groups.rank]) == groups.rank
        if groups.rank and is_first_of_host and self.locks.acquire_probe():
            logger.warning(
                "%s: locks hold on one node only; do not use it in two runs at once",
                self.folder,
            )
        coordinator.gather(None, "try the output folder's locks")
        self.locks.release_probe()

    def find_remaining_jobs(self, *, retry_failed: bool) -> int:
        """Find the jobs to make, and return how many failed in earlier runs and are not retried."""
        outcomes = self.groups.coordinator.run_on_first_rank(
            self._read_outcomes, "look for what is done"
        )
        is_remaining = {None, FAILED} if retry_failed else {None}
        self.remaining_jobs = [
            job for job, outcome in zip(self.jobs, outcomes, strict=True) if outcome in is_remaining
        ]
        self._log_remaining_jobs(outcomes, retry_failed=retry_failed)
        return 0 if retry_failed else int(outcomes.count(FAILED))

    def take_next_job(self) -> PlannedJob | None:
        """Lock and return the next job that no other run has, None after the last.

        The same on all ranks of the replica.
        """
        index = self.groups.run_on_first_rank(self._lock_next_job, "take the next job")
        return None if index is None else self.remaining_jobs[index]

    def _lock_next_job(self) -> int | None:
        while (index := self.counters.add("next") - 1) < len(self.remaining_jobs):
            job = self.remaining_jobs[index]
            if self.locks.acquire(job.name):
                if self._read_outcome(job) != DONE:
                    return index
                self.locks.release(job.name)
            self.counters.add("elsewhere")  # another run is making it, or has made it meanwhile
        return None

    def finish_job(self, job: PlannedJob, outcome: str) -> None:
        """Release and count a job; ``outcome`` is done or failed."""
        self.locks.release(job.name)
        self.counters.add(outcome)

    def wait_for_replicas(self) -> None:
        """Have the first rank wait for all replicas, as it logs the summary of the run."""
        coordinator = self.groups.coordinator
        if self.groups.replica.rank == 0:
            self.counters.add("ended")
        if self.groups.rank == 0:
            first_ranks = range(0, coordinator.num_ranks, self.groups.replica.size)
            num_replicas = self.groups.dp.size
            coordinator.wait_until(
                lambda: self.counters["ended"] == num_replicas, "make their jobs", first_ranks
            )

    def _read_outcome(self, job: PlannedJob) -> str | None:
        """Return the outcome of a job in earlier runs: done, failed, or None."""
        try:
            return self.locks.read_outcome(job.name, self._compute_digest(job))
        except InputError:  # an image is missing: the job fails when it is made
            return None

    def _read_outcomes(self) -> list[str | None]:
        outcomes = [self._read_outcome(job) for job in self.jobs]
        if self.locks.num_older_records:
            logger.info(
                "note      %d records are of an earlier version of wan-dist; their jobs are run again",
                self.locks.num_older_records,
            )
        return outcomes

    def _log_remaining_jobs(self, outcomes: Sequence[str | None], *, retry_failed: bool) -> None:
        parts = [f"{outcomes.count(DONE)} done before"] if DONE in outcomes else []
        if FAILED in outcomes:
            hint = "run again" if retry_failed else "retry_failed=true runs them again"
            parts.append(f"{outcomes.count(FAILED)} failed before ({hint})")
        num_replicas, replica_size = self.groups.dp.size, self.groups.replica.size
        ranks_text = f"{replica_size} rank{'s' if replica_size > 1 else ''}"
        if num_replicas > 1:
            ranks_text = f" on {num_replicas} replicas of {ranks_text}"
        else:
            ranks_text = f" on {ranks_text}" if replica_size > 1 else ""
        parts.append(f"{len(self.remaining_jobs)} to make{ranks_text}")
        logger.info("jobs      %d: %s", len(outcomes), ", ".join(parts))
