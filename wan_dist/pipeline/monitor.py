"""Monitor of a video while it is generated: it is told of each step, and may cancel the video."""

from enum import IntEnum
from pathlib import Path

import torch

from wan_dist.parallel.consistency import find_maximum
from wan_dist.parallel.mesh import Axis
from wan_dist.runtime.signals import preemption


class VideoCancelledError(Exception):
    """The video was cancelled; raised on all ranks of the replica."""


class VideoMonitor:
    """Follows a video on the replica's first rank; does nothing unless a subclass overrides it."""

    def record_step(self, clip_index: int, num_done: int) -> None:
        """Handle a completed step; ``num_done`` counts those of the clip."""

    def record_preview(self, file: Path, clip_index: int, num_done: int) -> None:
        """Handle a picture of the unfinished video, after so many steps of the clip; called in a thread."""

    def is_cancelled(self) -> bool:
        """Whether the video is to be cancelled."""
        return False


class EndRequest(IntEnum):
    """Request to end a video early, on any rank; the highest one counts."""

    NONE = 0
    CANCEL = 1
    STOP = 2
    """The whole run ends, and may resume later."""


def find_end_request(monitor: VideoMonitor, axis: Axis, device: torch.device) -> EndRequest:
    """Return the request to end the video, the same on all ranks of the replica, which all call this."""
    request = EndRequest.NONE
    if preemption.requested_by is not None:
        request = EndRequest.STOP
    elif axis.rank == 0 and monitor.is_cancelled():
        request = EndRequest.CANCEL
    return EndRequest(find_maximum(request, axis, device))
