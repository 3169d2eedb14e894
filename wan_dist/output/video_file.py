"""Video writer: H.264 through ffmpeg as frames arrive, or PNG, and safetensors.

Files are written under a temporary name and renamed when they are complete.
"""

import contextlib
import subprocess
import tempfile
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.ffmpeg import FfmpegError, describe_failure, find_ffmpeg, read_packets

_ENCODING_OPTIONS = [
    # the rate factor is what quality=8 of the reference implementation means
    *("-c:v", "libx264", "-crf", "10", "-pix_fmt", "yuv420p"),
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    # of untagged videos, players guess the colour space from the size
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    *("-movflags", "+faststart"),
]
_SOUND_OPTIONS = ("-c:a", "aac", "-b:a", "192k")
_MAX_WAITING_CHUNKS = 2
"""Chunks that may wait to be encoded, which bounds the host memory."""


class SaveError(RuntimeError):
    """The video could not be written."""


def convert_to_uint8(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1] as uint8 in 0 ... 255, rounded to nearest, on the same device.

    Frames that are uint8 are returned unchanged.
    """
    return (
        frames
        if frames.dtype == torch.uint8
        else (frames.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte()
    )


class SoundTrack(NamedTuple):
    """Sound of a video: what of a file is played from its first frame on."""

    file: Path
    start_seconds: float
    seconds: float


class VideoWriter:
    """Writer of an mp4 (H.264, yuv420p), which is encoded while frames arrive.

    ``path`` appears only when the file has all ``num_frames`` frames. The methods raise SaveError.
    """

    def __init__(
        self, path: Path, *, fps: int, num_frames: int, sound: SoundTrack | None = None
    ) -> None:
        self.num_written = 0
        """Frames so far."""
        self._encoding = _write_video(path, fps, num_frames, sound)

    def write(self, frames: Tensor) -> None:
        """Add uint8 frames (n, H, W, 3), at least one."""
        if self.num_written == 0:
            next(self._encoding)
        self._encoding.send(frames)
        self.num_written += len(frames)

    def finish(self) -> None:
        """Complete the file, after all its frames."""
        next(self._encoding, None)

    def close(self) -> None:
        """Remove what was written, unless it is finished."""
        self._encoding.close()


def save_video(
    path: Path,
    chunks: Iterable[Tensor],
    *,
    fps: int,
    num_frames: int,
    sound: SoundTrack | None = None,
) -> None:
    """Write uint8 chunks (n, H, W, 3) as they arrive; see `VideoWriter`.

    An error from ``chunks`` is passed on.
    """
    with contextlib.closing(
        VideoWriter(path, fps=fps, num_frames=num_frames, sound=sound)
    ) as writer:
        for frames in chunks:
            writer.write(frames)
        writer.finish()


def _write_video(
    path: Path, fps: int, num_frames: int, sound: SoundTrack | None
) -> Generator[None, Tensor | None, None]:
    """Write the frames that are sent to it, until None is; see `VideoWriter`."""
    try:
        with atomic_write(path) as temporary_file:
            yield from _encode_video(temporary_file, fps, sound)
            num_written = _count_frames(temporary_file)
            if num_written != num_frames:
                raise SaveError(
                    f"cannot write {path}: it has {num_written} frames, not {num_frames}"
                )
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from error


def _count_frames(path: Path) -> int:
    """Return how many frames a video's container holds, by reading all of it; raises SaveError."""
    try:
        return len(read_packets(path).intervals)
    except FfmpegError as error:
        raise SaveError(f"cannot read {path} again: {error}") from None


def _find_ffmpeg() -> str:
    try:
        return find_ffmpeg()
    except FfmpegError as error:
        raise SaveError(str(error)) from None


def _encode_video(
    path: Path, fps: int, sound: SoundTrack | None
) -> Generator[None, Tensor | None, None]:
    first_chunk = yield
    assert first_chunk is not None
    height, width = first_chunk.shape[1:3]
    with (
        tempfile.TemporaryFile() as error_file,
        subprocess.Popen(
            _build_encoding_command(path, width, height, fps, sound),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=error_file,
            process_group=0,
        ) as ffmpeg,
        ThreadPoolExecutor(1) as sender,  # while a chunk is sent and encoded, the next one is made
    ):
        assert ffmpeg.stdin is not None
        try:
            # a broken pipe: ffmpeg has ended; its exit code and last lines are read below
            with contextlib.suppress(BrokenPipeError):
                yield from _send_chunks(first_chunk, ffmpeg.stdin, sender)
        except BaseException:
            ffmpeg.kill()
            raise
        finally:
            sender.shutdown()
            with contextlib.suppress(BrokenPipeError):
                ffmpeg.stdin.close()
        if ffmpeg.wait():
            error_file.seek(0)
            failure = describe_failure(error_file.read(), ffmpeg.returncode)
            raise SaveError(f"cannot write {path}: {failure}")


def _build_encoding_command(
    path: Path, width: int, height: int, fps: int, sound: SoundTrack | None
) -> list[str]:
    """Return the ffmpeg command that encodes raw RGB frames from standard input, with sound of a file."""
    frame_format = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    input_options = [*frame_format, "-r", str(fps), "-i", "-"]
    log_options = ["-y", "-loglevel", "error"]
    output_options = [*_ENCODING_OPTIONS, str(path.absolute())]
    if sound is not None:
        input_options += ["-i", str(sound.file.absolute())]
        # Cut by samples; a file that begins later or has gaps keeps its times.
        end = sound.start_seconds + sound.seconds
        cut = (
            f"aresample=async=1:first_pts=0,atrim={sound.start_seconds}:{end},asetpts=PTS-STARTPTS"
        )
        output_options = [
            *("-map", "0:v:0", "-map", "1:a:0", "-af", cut, *_SOUND_OPTIONS),
            *output_options,
        ]
    return [_find_ffmpeg(), *log_options, *input_options, *output_options]


def _send_chunks(
    chunk: Tensor | None, pipe: IO[bytes], sender: ThreadPoolExecutor
) -> Generator[None, Tensor | None, None]:
    """Write chunks to a pipe in the sender's thread; at most ``_MAX_WAITING_CHUNKS`` wait for it."""
    pending_sends: deque[Future[None]] = deque()
    while chunk is not None:
        pending_sends.append(sender.submit(_send_frames, *_copy_to_host(chunk), pipe))
        if len(pending_sends) > _MAX_WAITING_CHUNKS:
            pending_sends.popleft().result()
        chunk = yield
    while pending_sends:
        pending_sends.popleft().result()


def _copy_to_host(chunk: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy a chunk to the host; return the copy, and the event to wait for before it is read."""
    if not chunk.is_cuda:
        return chunk, None
    host_chunk = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True).copy_(
        chunk, non_blocking=True
    )
    copy_event = torch.cuda.Event()
    copy_event.record()
    return host_chunk, copy_event


def _send_frames(frames: Tensor, copy_event: torch.cuda.Event | None, pipe: IO[bytes]) -> None:
    if copy_event is not None:
        copy_event.synchronize()
    pipe.write(frames.numpy().data)


def save_image(path: Path, frame: Tensor) -> None:
    """Write one uint8 frame (H, W, 3) as PNG; raises SaveError."""
    try:
        with atomic_write(path) as temporary_file:
            Image.fromarray(frame.cpu().numpy()).save(temporary_file)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from error


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, with ``metadata`` in the header.

    ``path`` appears when the file is complete. Raises SaveError.
    """
    try:
        with atomic_write(path) as temporary_file:
            temporary_file.write_bytes(save(tensors, metadata))
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from error
