"""Frames -> files: H.264 video streamed to ffmpeg as frames arrive, or a PNG; written aside and renamed when whole."""

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from wan_dist.runtime.atomic_write import written_aside

_ENCODING = [
    *(
        "-c:v",
        "libx264",
        "-crf",
        "10",
        "-pix_fmt",
        "yuv420p",
    ),  # the rate factor is what the reference's quality=8 means
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *(
        "-colorspace",
        "bt709",
        "-color_primaries",
        "bt709",
        "-color_trc",
        "bt709",
    ),  # untagged, players guess by the size
    *("-movflags", "+faststart"),
]


_MOST_WAITING = 2
"""Chunks that may wait to be encoded."""


class SaveError(RuntimeError):
    """The video could not be written."""


def to_uint8(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1] as uint8 in 0 ... 255, rounded to nearest, on the same device; those that are uint8 as they are."""
    return frames if frames.dtype == torch.uint8 else (frames.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte()


def save_video(path: Path, chunks: Iterable[Tensor], *, fps: int, num_frames: int) -> None:
    """Write uint8 chunks (n, H, W, 3) as they arrive to an mp4 (H.264, yuv420p).

    ``path`` appears only when the file holds all ``num_frames`` frames. Raises SaveError otherwise; an error from ``chunks`` passes.
    """
    try:
        with written_aside(path) as aside:
            _encode(aside, iter(chunks), fps)
            found = _count_frames(aside)
            if found != num_frames:
                raise SaveError(f"cannot write {path}: it has {found} frames, not {num_frames}")
    except OSError as fault:
        raise SaveError(f"cannot write {path}: {fault}") from fault


def _count_frames(path: Path) -> int:
    """Decode a video and return how many frames it has; in a process group of its own, which Ctrl-C does not reach. Raises SaveError."""
    command = [_ffmpeg(), "-nostdin", "-i", str(path.absolute()), "-map", "0:v:0", "-f", "null", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, process_group=0, check=False)
    counts = re.findall(rb"frame=\s*(\d+)", done.stderr)
    if done.returncode or not counts:
        last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SaveError(f"cannot read {path} again: ffmpeg says {' '.join(last_words) or 'nothing'} (exit code {done.returncode})")
    return int(counts[-1])


def _ffmpeg() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as fault:
        raise SaveError(str(fault).split(". ")[0]) from None


def _encode(path: Path, chunks: Iterator[Tensor], fps: int) -> None:
    first = next(chunks)
    height, width = first.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command = [_ffmpeg(), "-y", "-loglevel", "error", *source, *_ENCODING, str(path.absolute())]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, process_group=0) as ffmpeg,
        ThreadPoolExecutor(1) as sender,  # while a chunk is sent and encoded, the next one is made
    ):
        assert ffmpeg.stdin is not None
        sending: deque[Future[None]] = deque()
        try:
            with contextlib.suppress(BrokenPipeError):  # ffmpeg gave up; its exit code and last words follow
                for chunk in itertools.chain([first], chunks):
                    sending.append(sender.submit(_send, *_to_host(chunk), ffmpeg.stdin))
                    if len(sending) > _MOST_WAITING:
                        sending.popleft().result()
                while sending:
                    sending.popleft().result()
        except BaseException:
            ffmpeg.kill()
            raise
        finally:
            sender.shutdown()
            with contextlib.suppress(BrokenPipeError):
                ffmpeg.stdin.close()
        if ffmpeg.wait():
            errors.seek(0)
            last_words = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise SaveError(f"cannot write {path}: ffmpeg says {' '.join(last_words) or 'nothing'} (exit code {ffmpeg.returncode})")


def _to_host(chunk: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to copy a chunk to the host; returns the copy and what to wait for before it is read."""
    if not chunk.is_cuda:
        return chunk, None
    copy = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True).copy_(chunk, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return copy, done


def _send(frames: Tensor, ready: torch.cuda.Event | None, pipe: IO[bytes]) -> None:
    if ready is not None:
        ready.synchronize()
    pipe.write(frames.numpy().data)


def save_image(path: Path, frame: Tensor) -> None:
    """Write one uint8 frame (H, W, 3) as PNG; raises SaveError."""
    try:
        with written_aside(path) as aside:
            Image.fromarray(frame.cpu().numpy()).save(aside)
    except OSError as fault:
        raise SaveError(f"cannot write {path}: {fault}") from fault


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with ``facts`` in its header; ``path`` appears when the file is whole. Raises SaveError."""
    try:
        with written_aside(path) as aside:
            aside.write_bytes(save(tensors, facts))
    except OSError as fault:
        raise SaveError(f"cannot write {path}: {fault}") from fault
