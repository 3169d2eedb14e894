"""Video writer: a video through ffmpeg as frames arrive, or PNG, and safetensors.

Files are written under a temporary name and renamed when they are complete.
"""

import contextlib
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor

from wan_dist.output.video_encoding import ENCODER_ENVIRONMENT, VideoEncoding
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.ffmpeg import FfmpegError, describe_failure, format_comment, read_packets

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


def convert_to_10_bits(frames: Tensor) -> Tensor:
    """Return frames (n, H, W, 3) in [-1, 1] in 10 bits, as bytes of numbers of 16: (n, H, W, 6), uint8.

    Rounded to nearest, on the same device. The highest 10 bits, little-endian, are the number: ffmpeg cuts
    off the others. Not every collective and kernel takes torch.uint16. Frames that are uint8 are returned
    unchanged.
    """
    if frames.dtype == torch.uint8:
        return frames
    numbers = (frames.float() * 511.5 + 511.5).round_().clamp_(0, 1023).int()
    return (numbers * 64 + numbers // 16).to(torch.int16).contiguous().view(torch.uint8)


class VideoWriter:
    """Writer of a video file, which is encoded while frames arrive.

    ``path`` appears only when the file has all ``num_frames`` frames; ``comment`` is a text that it carries.
    The methods raise SaveError.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: int,
        num_frames: int,
        encoding: VideoEncoding | None = None,
        comment: str | None = None,
    ) -> None:
        self.num_written = 0
        """Frames so far."""
        encoding = encoding or VideoEncoding()
        self._encoding = _write_video(path, fps, num_frames, encoding, comment)

    def write(self, frames: Tensor) -> None:
        """Add frames, at least one: uint8 (n, H, W, 3), or as `convert_to_10_bits` returns them."""
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
    encoding: VideoEncoding | None = None,
    comment: str | None = None,
) -> None:
    """Write chunks as they arrive; see `VideoWriter`.

    An error from ``chunks`` is passed on.
    """
    with contextlib.closing(
        VideoWriter(path, fps=fps, num_frames=num_frames, encoding=encoding, comment=comment)
    ) as writer:
        for frames in chunks:
            writer.write(frames)
        writer.finish()


def _write_video(
    path: Path, fps: int, num_frames: int, encoding: VideoEncoding, comment: str | None
) -> Generator[None, Tensor | None, None]:
    """Write the frames that are sent to it, until None is; see `VideoWriter`."""
    try:
        with atomic_write(path) as temporary_file, _write_comment_file(comment) as comment_file:
            first_chunk = yield
            assert first_chunk is not None
            try:
                command = encoding.build_command(
                    temporary_file,
                    frame_format=_describe_frames(first_chunk),
                    fps=fps,
                    num_frames=num_frames,
                    comment_file=comment_file,
                )
            except FfmpegError as error:
                raise SaveError(f"cannot write {path}: {error}") from None
            yield from _encode_video(path, command, first_chunk)
            num_written = _count_frames(temporary_file)
            if num_written != num_frames:
                raise SaveError(
                    f"cannot write {path}: it has {num_written} frames, not {num_frames}"
                )
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _write_comment_file(comment: str | None) -> Iterator[Path | None]:
    """Yield a temporary file from which ffmpeg reads a comment, which may be longer than a command line."""
    if comment is None:
        yield None
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".txt") as file:
        file.write(format_comment(comment))
        file.flush()
        yield Path(file.name)


def _describe_frames(frames: Tensor) -> list[str]:
    """Return ffmpeg's options for frames as `VideoWriter.write` takes them."""
    _, height, width, num_bytes = frames.shape
    pixel_format = "rgb24" if num_bytes == 3 else "rgb48le"
    return ["-f", "rawvideo", "-pix_fmt", pixel_format, "-s", f"{width}x{height}"]


def _count_frames(path: Path) -> int:
    """Return how many frames a video's container holds, by reading all of it; raises SaveError."""
    try:
        return len(read_packets(path).intervals)
    except FfmpegError as error:
        raise SaveError(f"cannot read {path} again: {error}") from None


def _encode_video(
    path: Path, command: list[str], first_chunk: Tensor
) -> Generator[None, Tensor | None, None]:
    """Send frames to ffmpeg, until None is sent; raises SaveError with ``path`` if it fails."""
    with (
        tempfile.TemporaryFile() as error_file,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=error_file,
            process_group=0,
            env=os.environ | ENCODER_ENVIRONMENT,
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


def _send_chunks(
    chunk: Tensor | None, pipe: IO[bytes], sender: ThreadPoolExecutor
) -> Generator[None, Tensor | None, None]:
    """Write chunks to a pipe in the sender's thread; at most ``_MAX_WAITING_CHUNKS`` wait for it."""
    pending_sends: deque[Future[None]] = deque()
    while chunk is not None:
        pending_sends.append(sender.submit(_send_frames, *copy_to_host(chunk), pipe))
        if len(pending_sends) > _MAX_WAITING_CHUNKS:
            pending_sends.popleft().result()
        chunk = yield
    while pending_sends:
        pending_sends.popleft().result()


def copy_to_host(chunk: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
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


def save_image(path: Path, frame: Tensor, comment: str | None = None) -> None:
    """Write one uint8 frame (H, W, 3) as PNG, which carries ``comment``; raises SaveError."""
    texts = PngInfo()
    if comment is not None:
        texts.add_itxt("comment", comment, zip=True)
    try:
        with atomic_write(path) as temporary_file:
            Image.fromarray(frame.cpu().numpy()).save(temporary_file, pnginfo=texts)
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
