"""States of requested videos, as the front tells them: from request log, records and progress; no torch."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_dist.output.locks import ResultLocks
from wan_dist.output.record import DONE, VideoRecord
from wan_dist.planning.file_names import name_preview
from wan_dist.service.request_log import RequestLog, VideoRequest
from wan_dist.service.video_files import VideoProgress, find_result, read_final_record

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
STATUSES = (QUEUED, IN_PROGRESS, COMPLETED, FAILED)


@dataclass(frozen=True)
class VideoState:
    """State of a requested video."""

    request: VideoRequest
    status: str = QUEUED
    step: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    error: str | None = None
    file: Path | None = None
    preview: Path | None = None
    """Picture of the video while it is made, if the service makes them."""

    @property
    def is_final(self) -> bool:
        """Whether the state changes no more."""
        return self.status in (COMPLETED, FAILED)

    @property
    def progress(self) -> int:
        """Percentage of the denoising steps; 100 once the file is there."""
        if self.status == COMPLETED:
            return 100
        return min(99, 100 * self.step // max(1, self.request.num_steps))

    def to_json(self) -> dict[str, Any]:
        """Return the state as an object of OpenAI's video API, with fields of our own."""
        request = self.request
        error = None if self.error is None else {"code": "generation_failed", "message": self.error}
        return {
            "id": request.id,
            "object": "video",
            "model": request.task,
            "status": self.status,
            "progress": self.progress,
            "created_at": int(request.created_at),
            "started_at": None if self.started_at is None else int(self.started_at),
            "completed_at": None if self.completed_at is None else int(self.completed_at),
            "expires_at": None,
            "size": request.size,
            "seconds": f"{request.num_frames / request.fps:.4g}",
            "prompt": request.values["prompt"].removeprefix("@"),
            "seed": request.values["seed"],
            "step": self.step,
            "num_steps": request.num_steps,
            "preview": None
            if self.preview is None
            else f"/v1/videos/{request.id}/content?variant=preview",
            "error": error,
        }


class FinishedTotals:
    """Sums over finished videos, for metrics; they include those of earlier runs."""

    def __init__(self) -> None:
        self.num_by_status: Counter[str] = Counter()
        self.num_steps = 0
        self.step_seconds: tuple[int, float] = (0, 0.0)
        """Number of measured steps, and their seconds."""
        self.stage_seconds: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        """By stage: how often it was measured, and its seconds."""

    def add(self, state: VideoState, record: VideoRecord) -> None:
        """Add a finished video."""
        self.num_by_status[state.status] += 1
        if state.status == COMPLETED:
            self.num_steps += state.request.num_steps
        if record.step_seconds is not None:
            count, seconds = self.step_seconds
            num_steps = state.request.num_steps
            self.step_seconds = (count + num_steps, seconds + num_steps * record.step_seconds)
        for name, stage in (record.stages or {}).items():
            count, seconds = self.stage_seconds[name.split()[0]]
            self.stage_seconds[name.split()[0]] = (count + 1, seconds + stage.get("seconds", 0.0))


class VideoStates:
    """States of all requests of a log; ``run`` is the run whose ranks work on them now."""

    def __init__(self, log: RequestLog, run: str) -> None:
        self.log, self.run = log, run
        self.output_folder = log.folder.parent
        self.locks = ResultLocks(self.output_folder)
        self.totals = FinishedTotals()
        self._final_states: dict[str, VideoState] = {}
        self._lock = threading.Lock()

    def get(self, video_id: str) -> VideoState | None:
        """Return the state of a video, None for an id that is unknown or deleted."""
        request = self.log.requests.get(video_id)
        return None if request is None else self._find_state(request)

    def list_all(self) -> list[VideoState]:
        """Return all states, in the order of the requests."""
        return [self._find_state(request) for request in list(self.log.requests.values())]

    def list_unfinished(self) -> list[VideoState]:
        """Return the states of videos that are neither completed nor failed."""
        requests = list(self.log.requests.values())
        states = [
            self._find_state(request)
            for request in requests
            if request.id not in self._final_states
        ]
        return [state for state in states if not state.is_final]

    def forget(self, video_id: str) -> None:
        """Drop what is known of a deleted video."""
        with self._lock:
            self._final_states.pop(video_id, None)

    def _find_state(self, request: VideoRequest) -> VideoState:
        with self._lock:
            if (state := self._final_states.get(request.id)) is not None:
                return state
            if (record := read_final_record(self.locks, request.id)) is None:
                return self._find_progress(request)
            state = self._describe_final(request, record)
            self._final_states[request.id] = state
            self.totals.add(state, record)
            return state

    def _find_progress(self, request: VideoRequest) -> VideoState:
        progress = VideoProgress.read(self.output_folder, request.id)
        if progress is None or progress.run != self.run:
            return VideoState(request)
        preview = self.output_folder / name_preview(request.id)
        return VideoState(
            request,
            IN_PROGRESS,
            progress.step,
            progress.started_at,
            preview=preview if preview.is_file() else None,
        )

    def _describe_final(self, request: VideoRequest, record: VideoRecord) -> VideoState:
        is_done = record.status == DONE
        completed_at = None
        if record.began is not None:
            completed_at = record.began + (record.seconds or 0.0)
        return VideoState(
            request,
            COMPLETED if is_done else FAILED,
            request.num_steps if is_done else 0,
            record.began,
            completed_at,
            None if is_done else record.error or "unknown error",
            find_result(self.output_folder, record),
        )


def select_page(
    states: Iterable[VideoState], *, after_line: int | None, limit: int, order: str
) -> tuple[list[VideoState], bool]:
    """Return the states of a page of a list, and whether more follow.

    ``order`` is asc or desc, by time; ``after_line`` is the line in the log of the last one of the page
    before, which may be deleted.
    """
    ordered_states = list(states)
    if order == "desc":
        ordered_states.reverse()
    if after_line is not None:
        ordered_states = [
            state
            for state in ordered_states
            if state.request.line != after_line
            and (state.request.line > after_line) == (order == "asc")
        ]
    return ordered_states[:limit], len(ordered_states) > limit
