"""Result writer: the frames of a video's clips in one file, or a still, and as a tensor if requested."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.output.video_file import VideoWriter, convert_to_uint8, save_image, save_tensors
from wan_dist.planning.plan import VideoPlan


class ResultWriter:
    """Writes the frames of the clips as they arrive; the files appear after the last clip."""

    def __init__(self, plan: VideoPlan, file: Path, *, saves_tensor: bool) -> None:
        self.last_frames: Tensor | None = None
        """Of a clip that another one follows: (3, n, H, W), float32 in [-1, 1], on the CPU."""
        self._file, self._saves_tensor = file, saves_tensor
        self._float_chunks: list[Tensor] = []
        self._video_writer = VideoWriter(file, fps=plan.fps, num_frames=plan.num_frames)

    def write_clip(self, plan: VideoPlan, chunks: Iterable[Tensor]) -> None:
        """Write a clip's frames (n, H, W, 3): uint8, or float32 in [-1, 1].

        They are float32 where a tensor is saved or another clip follows. Frames that the clip before has
        too are left out, and those after the video's end, and what was written of this clip before memory
        ran out. Raises SaveError.
        """
        num_known_frames = self._video_writer.num_written - plan.first_frame_index
        last_chunks: deque[Tensor] = deque(maxlen=plan.num_repeated_frames)
        for chunk in chunks:
            num_missing_frames = plan.num_frames - self._video_writer.num_written
            new_frames = chunk[num_known_frames : num_known_frames + num_missing_frames]
            if len(new_frames):
                self._write_frames(plan, new_frames)
            num_known_frames = max(0, num_known_frames - len(chunk))
            last_chunks.append(chunk)
        if not plan.is_last_clip:
            self.set_last_frames(plan, last_chunks)
            return
        if not plan.task.is_still:
            self._video_writer.finish()
        if self._float_chunks:
            save_tensors(
                self._file.with_suffix(".safetensors"),
                {"video": torch.cat(self._float_chunks).permute(3, 0, 1, 2).contiguous()},
            )

    def set_last_frames(self, plan: VideoPlan, chunks: Iterable[Tensor]) -> None:
        """Set the frames that the next clip starts from, given a clip's last chunks (n, H, W, 3)."""
        frames = torch.cat(list(chunks)[-plan.num_repeated_frames :])
        self.last_frames = frames[-plan.num_repeated_frames :].permute(3, 0, 1, 2).cpu()

    def _write_frames(self, plan: VideoPlan, frames: Tensor) -> None:
        left, top, right, bottom = plan.crop
        frames = frames[:, top:bottom, left:right]
        if self._saves_tensor:
            self._float_chunks.append(frames.cpu())
        if plan.task.is_still:
            save_image(self._file, convert_to_uint8(frames)[0])
        else:
            self._video_writer.write(convert_to_uint8(frames))

    def close(self) -> None:
        """Remove what was written, unless the last clip was."""
        self._video_writer.close()
