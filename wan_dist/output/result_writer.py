"""Result writer: the frames of a video's clips in one file, or a still, and as a tensor if requested."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wan_dist.config.output_section import OutputConfig
from wan_dist.output.frames_file import FramesWriter
from wan_dist.output.video_encoding import SoundTrack, VideoEncoding
from wan_dist.output.video_file import (
    VideoWriter,
    convert_to_10_bits,
    convert_to_uint8,
    save_image,
)
from wan_dist.planning.video_plan import VideoPlan


class ResultWriter:
    """Writes the frames of the clips as they arrive; the files appear after the last clip."""

    def __init__(
        self, plan: VideoPlan, file: Path, output: OutputConfig, comment: str | None
    ) -> None:
        self.last_frames: Tensor | None = None
        """Of a clip that another one follows: (3, n, H, W), float32 in [-1, 1], on the CPU."""
        self._file, self._comment = file, comment
        self._frames_writer = (
            FramesWriter(file.with_suffix(".safetensors"), plan.num_frames)
            if output.save_tensor
            else None
        )
        self._num_written = 0
        """Frames of the video so far, also those that are only in the tensor."""
        self._convert_frames = convert_to_10_bits if output.format.bits > 8 else convert_to_uint8
        self._video_writer = VideoWriter(
            file,
            fps=plan.fps,
            num_frames=plan.num_shown_frames,
            encoding=VideoEncoding.from_config(output, find_sound_track(plan)),
            comment=comment,
        )

    def write_clip(self, plan: VideoPlan, chunks: Iterable[Tensor]) -> None:
        """Write a clip's frames (n, H, W, 3): float32 in [-1, 1], or as they are encoded.

        They are float32 where a tensor is saved or another clip follows. Frames that the clip before has
        too are left out, and those after the video's end, and what was written of this clip before memory
        ran out. Raises SaveError.
        """
        num_known_frames = self._num_written - plan.first_frame_index
        last_chunks: deque[Tensor] = deque(maxlen=plan.num_kept_frames)
        for chunk in chunks:
            num_missing_frames = plan.num_frames - self._num_written
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
        if self._frames_writer is not None:
            self._frames_writer.finish()

    def set_last_frames(self, plan: VideoPlan, chunks: Iterable[Tensor]) -> None:
        """Set the frames that the next clip starts from, given a clip's last chunks (n, H, W, 3)."""
        frames = torch.cat(list(chunks)[-plan.num_kept_frames :])
        self.last_frames = frames[-plan.num_kept_frames :].permute(3, 0, 1, 2).cpu()

    def _write_frames(self, plan: VideoPlan, frames: Tensor) -> None:
        left, top, right, bottom = plan.crop
        frames = frames[:, top:bottom, left:right]
        if self._frames_writer is not None:
            self._frames_writer.write(frames)
        shown = frames[: max(0, plan.num_shown_frames - self._num_written)]
        self._num_written += len(frames)
        if plan.task.is_still:
            save_image(self._file, convert_to_uint8(frames)[0], self._comment)
        elif len(shown):
            self._video_writer.write(self._convert_frames(shown))

    def close(self) -> None:
        """Remove what was written, unless the last clip was."""
        self._video_writer.close()
        if self._frames_writer is not None:
            self._frames_writer.close()


def find_sound_track(plan: VideoPlan) -> SoundTrack | None:
    """Return the sound of the video file, None where it has none."""
    speech = plan.speech
    if speech is None or speech.sound is None:
        return None
    return SoundTrack(
        speech.sound.path, speech.sound_start_seconds, plan.num_shown_frames / plan.fps
    )
