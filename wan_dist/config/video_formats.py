"""Formats of video files: codec, container, and what each takes; no torch."""

from dataclasses import dataclass

_RGB_COLOURS = "setparams=color_primaries=bt709:color_trc=bt709"
_YUV_COLOURS = f"scale=out_color_matrix=bt709:out_range=tv,{_RGB_COLOURS}"
"""ffmpeg's filters that tag a video as BT.709.

Of untagged videos, players guess the colours from the size. The options -color_primaries and -color_trc do
not tag frames that pass filters (ffmpeg 9.0).
"""
_MP4_OPTIONS = ("-movflags", "+faststart")
# QuickTime's own user data has 16-bit lengths: a longer comment would be lost
_MOV_OPTIONS = ("-movflags", "+faststart+use_metadata_tags")


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """A codec in a container, as ffmpeg writes it."""

    suffix: str
    encoder: str
    """Name of ffmpeg's encoder."""
    options: tuple[str, ...]
    """Further options of encoder and container."""
    pixel_format: str
    bits: int
    """Bits of a pixel's component."""
    min_bytes_per_pixel: float
    """Of a frame, at least; busy scenes take ten times as much of a lossy codec."""
    is_rgb: bool = False
    default_crf: int | None = None
    """Rate factor; None for codecs without one.

    Those of other codecs give about h264's error of luma, 48 to 50 dB with a little grain.
    """
    crf_range: tuple[int, int] = (0, 0)
    audio_codecs: tuple[str, ...] = ("aac", "mp3", "ac3", "eac3", "alac")
    """Sound that is copied into the container."""
    audio_encoder: str = "aac"
    """Of other sound."""
    is_playable: bool = True
    """Whether browsers play it, some at least."""
    playback_note: str = ""
    """Why browsers do not play it, or not all of them; empty where they do."""

    @property
    def filters(self) -> str:
        """Filters that convert RGB frames to the file's colours, and tag them."""
        return _RGB_COLOURS if self.is_rgb else _YUV_COLOURS


VIDEO_FORMATS = {
    "h264": VideoFormat(
        suffix=".mp4",
        encoder="libx264",
        options=_MP4_OPTIONS,
        pixel_format="yuv420p",
        bits=8,
        min_bytes_per_pixel=0.03,
        default_crf=10,  # what quality=8 of the reference implementation means
        crf_range=(1, 51),  # 0 would be a profile that browsers do not play
    ),
    "h265": VideoFormat(
        suffix=".mp4",
        encoder="libx265",
        # hvc1: Apple's players know no other tag
        options=("-tag:v", "hvc1", "-x265-params", "log-level=error", *_MP4_OPTIONS),
        pixel_format="yuv420p10le",
        bits=10,
        min_bytes_per_pixel=0.02,
        default_crf=8,
        crf_range=(0, 51),
        playback_note="browsers play H.265 only where the device decodes it",
    ),
    "av1": VideoFormat(
        suffix=".mp4",
        encoder="libsvtav1",
        options=("-preset", "8", *_MP4_OPTIONS),
        pixel_format="yuv420p10le",
        bits=10,
        min_bytes_per_pixel=0.005,
        default_crf=6,
        crf_range=(1, 63),
    ),
    "vp9": VideoFormat(
        suffix=".webm",
        encoder="libvpx-vp9",
        options=("-b:v", "0", "-row-mt", "1", "-cpu-used", "3"),
        pixel_format="yuv420p",  # profile 0, which every browser plays
        bits=8,
        min_bytes_per_pixel=0.015,
        default_crf=6,
        crf_range=(0, 63),
        audio_codecs=("opus", "vorbis"),
        audio_encoder="libopus",
    ),
    "prores": VideoFormat(
        suffix=".mov",
        encoder="prores_ks",
        options=("-profile:v", "hq", "-vendor", "apl0", *_MOV_OPTIONS),
        pixel_format="yuv422p10le",
        bits=10,
        min_bytes_per_pixel=0.2,
        audio_codecs=("aac", "mp3", "alac", "pcm_s16le", "pcm_s24le"),
        audio_encoder="pcm_s16le",
        is_playable=False,
        playback_note="browsers do not play ProRes",
    ),
    "ffv1": VideoFormat(
        suffix=".mkv",
        encoder="ffv1",
        options=("-level", "3", "-slicecrc", "1", "-g", "1"),
        pixel_format="gbrp10le",
        bits=10,
        min_bytes_per_pixel=0.3,
        is_rgb=True,
        audio_codecs=("aac", "mp3", "ac3", "eac3", "alac", "opus", "vorbis", "flac", "pcm_s16le"),
        audio_encoder="flac",
        is_playable=False,
        playback_note="browsers do not play FFV1",
    ),
    "png": VideoFormat(
        suffix=".mov",
        encoder="png",
        options=_MOV_OPTIONS,
        pixel_format="rgb24",
        bits=8,
        min_bytes_per_pixel=0.2,
        is_rgb=True,
        audio_codecs=("aac", "mp3", "alac", "pcm_s16le", "pcm_s24le"),
        audio_encoder="pcm_s16le",
        is_playable=False,
        playback_note="browsers do not play a film of PNG pictures",
    ),
}
"""By the value of ``output.video``."""
STILL_SUFFIX = ".png"
RESULT_SUFFIXES = tuple(
    dict.fromkeys((".mp4", STILL_SUFFIX, *(item.suffix for item in VIDEO_FORMATS.values())))
)
"""Suffixes of videos and images that a run writes."""


def remove_result_suffix(name: str) -> str:
    """Return a result's name without the suffix of its file, if it has one."""
    for suffix in RESULT_SUFFIXES:
        name = name.removesuffix(suffix)
    return name
