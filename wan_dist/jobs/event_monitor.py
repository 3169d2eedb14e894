"""Monitor of a job's video that reports its previews as events of the run."""

from pathlib import Path

from wan_dist.jobs.events import JobEvents
from wan_dist.jobs.planned_job import PlannedJob
from wan_dist.pipeline.monitor import VideoMonitor


class EventMonitor(VideoMonitor):
    """Writes an event for each preview of a job's video."""

    def __init__(self, events: JobEvents, job: PlannedJob) -> None:
        self._events, self._job = events, job
        self._steps_per_clip = len(job.plan.sampling.schedule)

    def record_preview(self, file: Path, clip_index: int, num_done: int) -> None:
        """Write the event ``preview``, with the file and the steps done, of all clips."""
        step = clip_index * self._steps_per_clip + num_done
        line = self._job.source.line
        self._events.write_event(
            "preview", job=self._job.name, line=line, file=str(file), step=step
        )
