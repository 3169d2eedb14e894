"""ffmpeg, as the package imageio-ffmpeg brings it: what a file holds, its frames and its sound; no torch.

Its encoders, and the text that a file carries, too.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import imageio_ffmpeg

_FLOAT_BYTES = 4
_SAMPLES_AT_ONCE = 2**20


class FfmpegError(RuntimeError):
    """ffmpeg is missing, or failed."""


@dataclass(frozen=True)
class VideoPackets:
    """What a video's container says of its first video stream, without decoding it."""

    width: int
    height: int
    intervals: tuple[tuple[float, float], ...]
    """When each frame begins and ends, in seconds, in the order in which they are shown."""


@dataclass(frozen=True)
class AudioTrack:
    """What a file's first audio stream holds once it is decoded."""

    rate: int
    """Samples of a channel in a second."""
    num_channels: int
    num_samples: int
    """Of a channel."""


def find_ffmpeg() -> str:
    """Return the path of the program; raises FfmpegError without one."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise FfmpegError(str(error).split(". ")[0]) from None


def read_packets(path: Path) -> VideoPackets:
    """Return size and times of a video's frames as it is stored; raises FfmpegError."""
    listing = _list_packets(path, "v", ["-c", "copy"])
    return VideoPackets(*_find_size(listing), _find_intervals(listing))


def read_shown_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of a video's first frame as it is shown, upright; raises FfmpegError."""
    return _find_size(_list_packets(path, "v", ["-frames:v", "1"]))


def read_audio_track(path: Path) -> AudioTrack:
    """Return what a file's audio holds, by decoding all of it; raises FfmpegError."""
    listing = _list_packets(path, "a", ["-c:a", "pcm_f32le"])
    rate = re.search(r"^#sample_rate 0: (\d+)", listing, re.MULTILINE)
    packets = re.findall(r"^0,\s*-?\d+,\s*-?\d+,\s*(\d+),\s*(\d+),", listing, re.MULTILINE)
    num_samples = sum(int(duration) for duration, _ in packets)
    num_bytes = sum(int(size) for _, size in packets)
    if rate is None or not num_samples:
        raise FfmpegError("it has no sound")
    return AudioTrack(int(rate[1]), num_bytes // (_FLOAT_BYTES * num_samples), num_samples)


def _list_packets(path: Path, stream_type: str, options: list[str]) -> str:
    """Return ffmpeg's list of the first stream of a type, ``v`` or ``a``: its packets, and lines of facts.

    ffmpeg runs in a process group of its own, which Ctrl-C does not reach.
    """
    input_options = ["-nostdin", "-i", str(path.absolute()), "-map", f"0:{stream_type}:0"]
    command = [find_ffmpeg(), "-v", "error", *input_options, *options, "-f", "framecrc", "-"]
    completed_process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, process_group=0, check=False
    )
    listing = completed_process.stdout.decode(errors="replace")
    if completed_process.returncode or not re.search(r"^\d", listing, re.MULTILINE):
        raise FfmpegError(describe_failure(completed_process.stderr, completed_process.returncode))
    return listing


def _find_size(listing: str) -> tuple[int, int]:
    match = re.search(r"^#dimensions 0: (\d+)x(\d+)", listing, re.MULTILINE)
    if match is None or not int(match[1]) * int(match[2]):
        raise FfmpegError("its size is not known")
    return int(match[1]), int(match[2])


def _find_intervals(listing: str) -> tuple[tuple[float, float], ...]:
    time_base = re.search(r"^#tb 0: (\d+)/(\d+)", listing, re.MULTILINE)
    assert time_base is not None  # ffmpeg writes it before the first line
    seconds = int(time_base[1]) / int(time_base[2])
    packets = re.findall(r"^0,\s*-?\d+,\s*(-?\d+),\s*(\d+),", listing, re.MULTILINE)
    times = sorted((int(start), int(start) + int(duration)) for start, duration in packets)
    return tuple((start * seconds, end * seconds) for start, end in times)


def read_frames(
    path: Path, size: tuple[int, int], frame_indices: Sequence[int]
) -> Iterator[bytearray]:
    """Yield frames as RGB (height, width, 3) in bytes, one at a time.

    ``size``: as of `read_shown_size`; ``frame_indices`` never decrease. Where the video ends before it has
    them all, its last frame is repeated. Raises FfmpegError.
    """
    width, height = size
    distinct_indices = sorted(set(frame_indices))
    select = "+".join(f"eq(n\\,{index})" for index in distinct_indices)
    command = [
        *(find_ffmpeg(), "-v", "error", "-nostdin", "-i", str(path.absolute()), "-map", "0:v:0"),
        *("-vf", f"select='{select}'", "-fps_mode", "passthrough"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    ]
    with _decode(command) as pipe:
        yield from _repeat_frames(
            _read_raw_frames(pipe, width * height * 3), distinct_indices, frame_indices
        )


def read_audio(path: Path, num_channels: int) -> Iterator[bytes]:
    """Yield the samples of a file's audio in pieces: float32, little-endian, channels side by side.

    ``num_channels``: as of `read_audio_track`. Raises FfmpegError.
    """
    command = [
        *(find_ffmpeg(), "-v", "error", "-nostdin", "-i", str(path.absolute()), "-map", "0:a:0"),
        *("-f", "f32le", "-"),
    ]
    with _decode(command) as pipe:
        num_read = 0
        while piece := pipe.read(num_channels * _FLOAT_BYTES * _SAMPLES_AT_ONCE):
            num_read += len(piece)
            yield piece
        if not num_read:
            raise EOFError


@contextmanager
def _decode(command: list[str]) -> Iterator[IO[bytes]]:
    """Run ffmpeg, and give its standard output; raises FfmpegError where reading it raises EOFError."""
    with (
        tempfile.TemporaryFile() as error_file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=error_file,
            process_group=0,
        ) as ffmpeg,
    ):
        assert ffmpeg.stdout is not None
        try:
            yield ffmpeg.stdout
        except EOFError:
            error_file.seek(0)
            raise FfmpegError(describe_failure(error_file.read(), ffmpeg.wait())) from None
        finally:
            ffmpeg.kill()  # where not all of it was wanted


def _read_raw_frames(pipe: IO[bytes], num_bytes: int) -> Iterator[bytearray]:
    frame = bytearray(num_bytes)
    while pipe.readinto(frame) == num_bytes:  # type: ignore[attr-defined]  # a BufferedReader
        yield frame
        frame = bytearray(num_bytes)


def _repeat_frames(
    frames: Iterator[bytearray], distinct_indices: Sequence[int], frame_indices: Sequence[int]
) -> Iterator[bytearray]:
    """Yield the frames at ``frame_indices`` from those at the distinct ones; raises EOFError without any."""
    frame: bytearray | None = None
    pending_indices = list(frame_indices)
    for index in distinct_indices:
        frame = next(frames, frame)
        if frame is None:
            raise EOFError
        while pending_indices and pending_indices[0] == index:
            del pending_indices[0]
            yield frame


def describe_failure(errors: bytes, return_code: int) -> str:
    """Return the last line of what ffmpeg wrote to its standard error, and its exit code."""
    last_lines = errors.decode(errors="replace").strip().splitlines()[-1:]
    return f"ffmpeg says {' '.join(last_lines) or 'nothing'} (exit code {return_code})"


@cache
def list_encoders(ffmpeg: str) -> frozenset[str]:
    """Return the names of the encoders that a program has; raises FfmpegError where it does not run."""
    try:
        listing = subprocess.run(
            [ffmpeg, "-hide_banner", "-encoders"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            process_group=0,
            check=False,
        )
    except OSError as error:
        raise FfmpegError(f"{ffmpeg} cannot be run: {error.strerror}") from None
    if listing.returncode:
        raise FfmpegError(describe_failure(listing.stderr, listing.returncode))
    names = re.findall(r"^ [A-Z][A-Z.]{5} ([\w-]+)", listing.stdout.decode(), re.MULTILINE)
    return frozenset(names)


def read_audio_codec(path: Path) -> str:
    """Return the codec of a file's first sound track; raises FfmpegError without one."""
    listing = _list_packets(path, "a", ["-c", "copy", "-frames:a", "1"])
    match = re.search(r"^#codec_id 0: (\w+)", listing, re.MULTILINE)
    assert match is not None  # ffmpeg writes it before the first line
    return match[1]


def read_comment(path: Path) -> str | None:
    """Return the text in the standard tag ``comment`` of a video, None without it; raises FfmpegError."""
    command = [
        *(find_ffmpeg(), "-v", "error", "-nostdin", "-i", str(path.absolute())),
        *("-f", "ffmetadata", "-"),
    ]
    completed_process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, process_group=0, check=False
    )
    if completed_process.returncode:
        raise FfmpegError(describe_failure(completed_process.stderr, completed_process.returncode))
    listing = completed_process.stdout.decode(errors="replace")
    # a key at the beginning of a line, and a value in which a backslash makes the next character plain
    match = re.search(
        r"^comment=((?:\\.|[^\\\n])*)", listing, re.MULTILINE | re.DOTALL | re.IGNORECASE
    )
    return None if match is None else re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL)


def format_comment(text: str) -> str:
    """Return a metadata file for ffmpeg (ffmetadata) that gives a video this ``comment``.

    A backslash at the end of one of its lines is lost: ffmpeg 9.0 takes it for an escape.
    """
    escaped_text = re.sub(r"([=;#\\\n])", r"\\\1", text)
    return f";FFMETADATA1\ncomment={escaped_text}\n"
