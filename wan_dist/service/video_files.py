"""Files of a request's video in the output folder: its outcome, progress, uploaded images, and removal.

Imports no torch.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from wan_dist.output.locks import ResultLocks
from wan_dist.output.record import DONE, FAILED, VideoRecord
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.service.request_log import SERVICE_FOLDER


@dataclass
class VideoProgress:
    """Progress of a video that is being made, which its worker writes for the front."""

    run: str
    """Of the run that makes it; it is of no use to a later run."""
    started_at: float
    step: int = 0
    """Denoising steps completed, of all clips."""
    num_attempts: int = 1
    """Runs that have begun the video from the same step, and have not ended by a signal."""
    resumed_step: int = 0
    """Step that the last of them began from."""

    @classmethod
    def read(cls, output_folder: Path, video_id: str) -> Self | None:
        """Return a video's progress, None if there is none."""
        try:
            return cls(**json.loads(_get_progress_path(output_folder, video_id).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, output_folder: Path, video_id: str) -> None:
        """Replace the progress on disk, without waiting for the disk; raises OSError."""
        path = _get_progress_path(output_folder, video_id)
        partial_path = path.with_name(f".{video_id}.{secrets.token_hex(4)}.partial.json")
        partial_path.write_text(json.dumps(asdict(self)))
        partial_path.replace(path)


def _get_progress_path(output_folder: Path, video_id: str) -> Path:
    return output_folder / SERVICE_FOLDER / "progress" / f"{video_id}.json"


def get_uploads_folder(output_folder: Path) -> Path:
    """Return the folder of uploaded images."""
    return output_folder / SERVICE_FOLDER / "uploads"


def make_service_folders(output_folder: Path) -> None:
    """Make the folders of progress and uploads."""
    for folder in (get_uploads_folder(output_folder), _get_progress_path(output_folder, "").parent):
        folder.mkdir(parents=True, exist_ok=True)


def save_upload(output_folder: Path, content: bytes) -> str:
    """Save an image under a name made from its content, and return the name; it is on the disk then."""
    name = hashlib.sha256(content).hexdigest()
    path = get_uploads_folder(output_folder) / name
    if not path.exists():
        with atomic_write(path) as partial_path:
            partial_path.write_bytes(content)
    return name


def read_final_record(locks: ResultLocks, video_id: str) -> VideoRecord | None:
    """Return the record of a video that is done or has failed, None if it is to be made.

    The id is the request's own, so nothing else is compared: what was made once stays as it is.
    """
    record = locks.read_record(video_id)
    if record.status == FAILED:
        return record
    is_done = record.status == DONE and find_result(locks.folder, record) is not None
    return record if is_done else None


def find_result(output_folder: Path, record: VideoRecord) -> Path | None:
    """Return the video or image of a record, None if it is not there."""
    path = output_folder / Path(record.file or "").name
    return path if record.file and path.is_file() else None


def remove_video(output_folder: Path, video_id: str) -> None:
    """Remove all files of a video; the caller has the lock on its name."""
    progress_path = _get_progress_path(output_folder, video_id)
    paths = [
        path
        for folder in (output_folder, progress_path.parent)
        for pattern in (f"{video_id}.*", f".{video_id}.*")
        for path in folder.glob(pattern)
    ]
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def remove_uploads(output_folder: Path, names: Iterable[str]) -> None:
    """Remove uploaded images."""
    for name in names:
        (get_uploads_folder(output_folder) / name).unlink(missing_ok=True)
