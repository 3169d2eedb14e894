"""Encoding of a video file: ffmpeg's command for a format, with its colours, comment and sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from wan_dist.config.output_section import OutputConfig
from wan_dist.config.video_formats import VIDEO_FORMATS, VideoFormat
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import FfmpegError, find_ffmpeg, list_encoders, read_audio_codec

ENCODER_ENVIRONMENT = {"SVT_LOG": "1"}
"""SVT-AV1 writes errors alone to standard error."""

_LOSSY_AUDIO_ENCODERS = ("aac", "libopus")
_ADVICE = "Unset IMAGEIO_FFMPEG_EXE: the package imageio-ffmpeg brings a full one"


class SoundTrack(NamedTuple):
    """Sound of a video: what of a file is played from its first frame on."""

    file: Path
    start_seconds: float
    seconds: float


@dataclass(frozen=True)
class VideoEncoding:
    """What a video file is made of beside its frames."""

    name: str = "h264"
    """Key of `VIDEO_FORMATS`."""
    crf: int | None = None
    """None: the format's default."""
    audio: Path | None = None
    """File whose sound is laid under the video; what is longer than the video is cut off."""
    track: SoundTrack | None = None
    """Part of a file's sound that the video was made for, where no other is given."""

    @classmethod
    def from_config(cls, output: OutputConfig, track: SoundTrack | None = None) -> "VideoEncoding":
        """Return the encoding that the settings ask for."""
        audio = None if output.audio is None else Path(output.audio).expanduser()
        return cls(output.video, output.crf, audio, track)

    @property
    def format(self) -> VideoFormat:
        """Codec and container."""
        return VIDEO_FORMATS[self.name]

    def check(self) -> None:
        """Raise InputError where ffmpeg lacks an encoder, or the sound cannot be read."""
        try:
            ffmpeg = find_ffmpeg()
            encoders = list_encoders(ffmpeg)
        except FfmpegError as error:
            raise InputError(f"videos cannot be encoded: {error}. {_ADVICE}") from None
        if self.format.encoder not in encoders:
            others = [name for name, item in VIDEO_FORMATS.items() if item.encoder in encoders]
            raise InputError(
                f"output.video={self.name} needs the encoder {self.format.encoder}, which {ffmpeg} lacks; "
                f"it can write {', '.join(others) or 'none of the formats'}. {_ADVICE}"
            )
        if self.audio is None:
            return
        try:
            self.audio.open("rb").close()
            audio_options = self._choose_audio_options()
        except (OSError, FfmpegError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"output.audio={self.audio} cannot be read as sound: {reason}"
            ) from None
        if audio_options[1] not in ("copy", *encoders):
            raise InputError(
                f"output.audio={self.audio} needs the encoder {audio_options[1]}, which {ffmpeg} lacks; "
                f"{self.format.suffix} takes {', '.join(self.format.audio_codecs)} as they are"
            )

    def build_command(
        self,
        path: Path,
        *,
        frame_format: Sequence[str],
        fps: int,
        num_frames: int,
        comment_file: Path | None,
    ) -> list[str]:
        """Return the ffmpeg command that encodes raw frames from standard input.

        ``frame_format`` are ffmpeg's options for the frames; ``comment_file`` is one of `format_comment`.
        Raises FfmpegError.
        """
        inputs = [*frame_format, "-r", str(fps), "-i", "-"]
        outputs = ["-map", "0:v:0", "-map_metadata", "-1"]
        if comment_file is not None:
            inputs += ["-f", "ffmetadata", "-i", str(comment_file)]
            outputs[-1] = "1"
        if self.audio is not None:
            inputs += ["-t", f"{num_frames / fps:.6f}", "-i", str(self.audio.absolute())]
            outputs += ["-map", f"{1 if comment_file is None else 2}:a:0"]
            outputs += self._choose_audio_options()
        elif self.track is not None:
            inputs += ["-i", str(self.track.file.absolute())]
            outputs += ["-map", f"{1 if comment_file is None else 2}:a:0"]
            outputs += self._list_track_options(self.track)
        return [
            *(find_ffmpeg(), "-y", "-loglevel", "error"),
            *inputs,
            *outputs,
            *self._list_video_options(),
            str(path.absolute()),
        ]

    def _list_video_options(self) -> list[str]:
        video_format = self.format
        crf = video_format.default_crf if self.crf is None else self.crf
        return [
            *("-c:v", video_format.encoder),
            *(() if crf is None else ("-crf", str(crf))),
            *("-pix_fmt", video_format.pixel_format),
            *("-vf", video_format.filters),
            *(() if video_format.is_rgb else ("-colorspace", "bt709")),
            *video_format.options,
        ]

    def _list_track_options(self, track: SoundTrack) -> list[str]:
        """Return the options that cut a part of the sound and encode it."""
        # Cut by samples; a file that begins later or has gaps keeps its times.
        end = track.start_seconds + track.seconds
        cut = (
            f"aresample=async=1:first_pts=0,atrim={track.start_seconds}:{end},asetpts=PTS-STARTPTS"
        )
        encoder = self.format.audio_encoder
        bit_rate = ("-b:a", "192k") if encoder in _LOSSY_AUDIO_ENCODERS else ()
        return ["-af", cut, "-c:a", encoder, *bit_rate]

    def _choose_audio_options(self) -> list[str]:
        """Return the options that copy the sound, or encode what the container does not take."""
        assert self.audio is not None
        codec = read_audio_codec(self.audio)
        is_copied = codec in self.format.audio_codecs
        return ["-c:a", "copy" if is_copied else self.format.audio_encoder]
