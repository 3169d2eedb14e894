"""Operations of the video API on request log and output folder: submit, list, delete; imports no torch.

They are called from several threads.
"""

import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wan_dist.runtime.errors import InputError, format_message
from wan_dist.service.request_fields import choose_image_keys, read_request_values
from wan_dist.service.request_log import RequestLogWriter, VideoRequest
from wan_dist.service.request_planner import RequestPlanner, describe_plan
from wan_dist.service.video_files import (
    get_uploads_folder,
    make_service_folders,
    remove_uploads,
    remove_video,
    save_upload,
)
from wan_dist.service.video_states import QUEUED, VideoState, VideoStates

_SEEDS = 2**31
"""Number of seeds that are drawn from, where a request has none."""


class QueueFullError(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Deletion:
    """A deleted video whose files may have to wait for the rank that is making it."""

    video_id: str
    upload_names: frozenset[str]


class VideoService:
    """The requests of an output folder, of which this process is the one front."""

    def __init__(self, planner: RequestPlanner, run: str) -> None:
        self.planner = planner
        self.folder = planner.output_folder
        self.log = RequestLogWriter(self.folder)
        self.states = VideoStates(self.log, run)
        self._submit_lock = threading.Lock()

    def open(self) -> None:
        """Open the log; raises InputError, see `RequestLogWriter.open`."""
        self.log.open()
        make_service_folders(self.folder)

    def submit(
        self,
        fields: Mapping[str, object],
        uploads: Mapping[str, bytes],
        idempotency_key: str | None = None,
    ) -> VideoState:
        """Accept a request, and return its state; it is on the disk then.

        A request with the idempotency key of an earlier one is that one. Raises InputError for what no line
        of a job file could have, QueueFullError, and OSError where it cannot be saved.
        """
        with self._submit_lock:
            if (earlier_request := self._find_by_key(idempotency_key)) is not None:
                return self.states.get(earlier_request.id) or VideoState(earlier_request)
            self._check_queue()
            values = read_request_values(fields, self.planner.config, self.planner.task)
            if "seed" not in values:
                values["seed"] = self._choose_seed()
            image_keys = choose_image_keys(uploads, self.planner.task)
            images = {
                image_keys[field]: save_upload(self.folder, content)
                for field, content in uploads.items()
            }
            try:
                request = self._plan_request(values, images, idempotency_key)
                self.log.append_request(request)
            except BaseException:
                self._remove_unused_uploads(images.values())
                raise
            return VideoState(request)

    def delete(self, video_id: str) -> Deletion | None:
        """Delete a video, and return what is left to do by `remove_files`; None for an unknown id.

        No rank starts it from now on, and the one that is making it stops after its step. Raises OSError.
        """
        with self._submit_lock:
            request = self.log.requests.get(video_id)
            if request is None:
                return None
            self.log.append_deletion(video_id)
        return Deletion(video_id, frozenset(request.images.values()))

    def remove_files(self, deletion: Deletion) -> bool:
        """Remove the files of a deleted video, and return whether no rank is making it any more.

        The lock on its name is the rank's until its last word on the video.
        """
        if not self.states.locks.acquire(deletion.video_id):
            return False
        try:
            remove_video(self.folder, deletion.video_id)
        finally:
            self.states.locks.release(deletion.video_id)
        self.states.forget(deletion.video_id)
        with self._submit_lock:
            self._remove_unused_uploads(deletion.upload_names)
        return True

    def _find_by_key(self, idempotency_key: str | None) -> VideoRequest | None:
        if idempotency_key is None:
            return None
        requests = self.log.requests.values()
        return next((one for one in requests if one.idempotency_key == idempotency_key), None)

    def _check_queue(self) -> None:
        limit = self.planner.config.serve.max_queue
        unfinished_states = self.states.list_unfinished()
        if sum(state.status == QUEUED for state in unfinished_states) >= limit:
            raise QueueFullError(f"{limit} requests are waiting (serve.max_queue); try again later")

    def _choose_seed(self) -> int:
        """Return the seed given for the service, else a new one, which a resumed video keeps."""
        is_given = any(argument.startswith("seed=") for argument in self.planner.arguments)
        seed = self.planner.config.seed
        return seed if is_given and seed >= 0 else secrets.randbelow(_SEEDS)

    def _plan_request(
        self, values: dict[str, object], images: dict[str, str], idempotency_key: str | None
    ) -> VideoRequest:
        request = VideoRequest(
            id=f"video_{secrets.token_hex(16)}",
            created_at=round(time.time(), 3),
            task=self.planner.task.name,
            values=values,
            images=images,
            size="",
            num_frames=0,
            fps=0,
            num_steps=0,
            idempotency_key=idempotency_key,
        )
        try:
            plan = self.planner.plan_request(request).plan
        except InputError as error:
            raise InputError(self._hide_paths(str(error))) from None
        return replace(request, values=values | {"seed": plan.seed}, **describe_plan(plan))

    def _hide_paths(self, message: str) -> str:
        """Return an error message without the folder of uploads, which clients have no part in."""
        return format_message(message.replace(f"{get_uploads_folder(self.folder)}/", ""))

    def _remove_unused_uploads(self, names: Iterable[str]) -> None:
        used_names = {
            name for request in self.log.requests.values() for name in request.images.values()
        }
        remove_uploads(self.folder, set(names) - used_names)
