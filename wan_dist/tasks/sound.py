"""Sound files: what they hold, and their samples as speech models take them; no torch.

Source: `librosa.load` with its defaults, which the reference uses.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import AudioTrack, FfmpegError, read_audio, read_audio_track
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file

SPEECH_RATE = 16000
"""Samples in a second that speech models take."""

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sound:
    """A file's sound, as it is stored."""

    file: str
    track: AudioTrack

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.file).expanduser()

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.track.num_samples / self.track.rate

    @property
    def num_speech_samples(self) -> int:
        """Samples that `read_speech_samples` returns."""
        return -(-self.track.num_samples * SPEECH_RATE // self.track.rate)


def read_sound(file: str, key: str) -> Sound:
    """Return what a sound file, or a video's sound, holds.

    Raises InputError, naming the setting ``key``, for a file without sound.
    """
    path = Path(file).expanduser()
    try:
        check_regular_file(path)
        status = path.stat()
        track = _read_track(str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    except (UnreadableFileError, OSError) as error:
        raise InputError(f"{key}={file}: there is no such file ({error})") from None
    except FfmpegError as error:
        raise InputError(
            f"{key}={file} cannot be read as sound: {error}; wav, mp3, flac, m4a, ogg, and videos with "
            "sound can"
        ) from None
    return Sound(file, track)


@lru_cache(64)
def _read_track(path: str, *_: int) -> AudioTrack:
    """Return the track; the other arguments tell apart files that follow each other under one name."""
    return read_audio_track(Path(path))


def read_speech_samples(sound: Sound) -> Samples:
    """Return the mean of the channels at 16 kHz, in [-1, 1] where the file does not exceed it.

    Resampled by soxr at high quality; its end is padded with a zero where soxr returns one sample fewer.
    Raises InputError for samples that are not finite.
    """
    num_channels = sound.track.num_channels
    try:
        mono = np.concatenate(
            [
                np.frombuffer(piece, "<f4").reshape(-1, num_channels).mean(axis=1, dtype=np.float32)
                for piece in read_audio(sound.path, num_channels)
            ]
        )
    except FfmpegError as error:
        raise InputError(f"{sound.file} cannot be read as sound: {error}") from None
    if not np.isfinite(mono).all():
        raise InputError(
            f"{sound.file} has samples that are not finite; write it again as 16-bit wav"
        )
    samples = mono
    if sound.track.rate != SPEECH_RATE:
        import soxr  # not at every start, and not where nothing is resampled

        samples = soxr.resample(mono, sound.track.rate, SPEECH_RATE, "HQ")
    samples = samples[: sound.num_speech_samples]
    return np.pad(samples, (0, sound.num_speech_samples - len(samples)))
