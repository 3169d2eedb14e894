"""Tasks that are steered by a source video, a mask and reference images (VACE)."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import AREA_480P, Task, TaskInputs
from wan_dist.tasks.published_dims import DIMS_VACE_1_3B, DIMS_VACE_14B, SIZES_480P, SIZES_720P
from wan_dist.tasks.source_video import SourceVideo, VideoFacts

_PATCH_PIXELS = 16
"""Pixels of a token along a side."""
_MAX_TOKENS_480P, _MAX_TOKENS_720P = 32760, 75600
"""Tokens of the longest video, for areas up to 480P and above; short sides allow more frames."""


@dataclass(frozen=True)
class VaceInputs(TaskInputs):
    """A source video, a mask of what to generate in it, and reference images; each may be left out."""

    kind: str = "vace"
    file_keys: tuple[str, ...] = ("src_video", "src_mask", "src_ref_images")
    usage: str = "src_video=FILE src_mask=FILE src_ref_images=FILE,FILE, each of them or none"
    is_always_encoded: bool = True
    has_reference_frames: bool = True

    def check_keys(self, given_keys: Collection[str]) -> None:
        """Raise InputError for a mask without the video that it is of."""
        if "src_mask" in given_keys and "src_video" not in given_keys:
            raise InputError(
                "src_mask is given without src_video: it says which parts of a video to generate; "
                "give src_video=FILE, or leave src_mask out"
            )


def fit_source_video(video: VideoFacts, mask: VideoFacts | None, area: int) -> SourceVideo:
    """Return the size and the frames that are taken of a source video.

    The video is never enlarged beyond its own size or ``area`` pixels, and its frames, however long it is,
    are spread over as many as the token budget allows. Where the mask has fewer frames, those after them
    are left out, unless it has one for all. As `VaceVideoProcessor` of the reference; where frames leave
    gaps, the nearest one is taken. Raises InputError for a video that is too small.
    """
    max_tokens = _MAX_TOKENS_480P if area <= AREA_480P else _MAX_TOKENS_720P
    rows, columns = video.height // _PATCH_PIXELS, video.width // _PATCH_PIXELS
    tokens_per_frame = min(max_tokens, area // _PATCH_PIXELS**2, rows * columns)
    if tokens_per_frame < 1:
        raise InputError(
            f"src_video={video.file} of {video.width}x{video.height} is smaller than "
            f"{_PATCH_PIXELS}x{_PATCH_PIXELS} pixels"
        )
    num_used = video.num_frames
    if mask is not None and mask.num_frames > 1:
        num_used = min(num_used, mask.num_frames)
    num_latent_frames = min((num_used - 1) // 4 + 1, int(max_tokens / tokens_per_frame))
    tokens_per_frame = min(tokens_per_frame, int(max_tokens / num_latent_frames))
    fitted_rows = max(1, round((tokens_per_frame * video.height / video.width) ** 0.5))
    fitted_columns = max(1, int(tokens_per_frame / fitted_rows))
    return SourceVideo(
        video,
        mask,
        (fitted_columns * _PATCH_PIXELS, fitted_rows * _PATCH_PIXELS),
        _spread_frames(video, num_used, 4 * (num_latent_frames - 1) + 1),
    )


def _spread_frames(video: VideoFacts, num_used: int, num_wanted: int) -> tuple[int, ...]:
    """Return the indices of frames at evenly spaced times, up to the middle of the last used one."""
    starts, ends = np.array(video.intervals, dtype=np.float32).T  # as decord has them
    end_time = (float(starts[num_used - 1]) + float(ends[num_used - 1])) / 2
    indices = []
    for time in np.linspace(0, end_time, num_wanted):
        is_shown = (starts <= time) & (time <= ends)
        distances = np.maximum(starts - time, time - ends)
        indices.append(int(is_shown.argmax() if is_shown.any() else distances.argmin()))
    return tuple(sorted(indices))


TASKS = (
    Task(
        name="vace-1.3B",
        repository="Wan-AI/Wan2.1-VACE-1.3B",
        transformer_dims=DIMS_VACE_1_3B,
        inputs=VaceInputs(),
        published_sizes=SIZES_480P,
    ),
    Task(
        name="vace-14B",
        repository="Wan-AI/Wan2.1-VACE-14B",
        transformer_dims=DIMS_VACE_14B,
        inputs=VaceInputs(),
        published_sizes=SIZES_720P,
    ),
    Task(
        name="vace-A14B",
        repository="alibaba-pai/Wan2.2-VACE-Fun-A14B",
        transformer_dims=DIMS_VACE_14B,
        inputs=VaceInputs(),
        expert_boundary=0.875,
        published_sizes=SIZES_720P,
    ),
)
