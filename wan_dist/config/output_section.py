"""Section of the configuration: where results go, and what their files are."""

from dataclasses import dataclass
from typing import Any

from wan_dist.config.checks import check_choice, check_file_name
from wan_dist.config.settings import Effect
from wan_dist.config.settings import add_setting as _key
from wan_dist.config.video_formats import VIDEO_FORMATS, VideoFormat
from wan_dist.runtime.errors import InputError

DEFAULT_VIDEO = "h264"


@dataclass(kw_only=True)
class OutputConfig:
    """Where the results go."""

    dir: str = _key("outputs", "folder of the results; made if missing")
    events: str | None = _key(
        None,
        "file that gets a line of JSON per event of a run with jobs; - is standard output",
    )
    name: str | None = _key(
        None, "file name without suffix; null: from task, prompt and seed", Effect.LATENTS
    )
    save_latents: bool = _key(True, "save the denoised latents beside the video")
    save_tensor: bool = _key(
        False,
        "also save the frames as safetensors: video, float32 (3, F, H, W) in [-1, 1]",
        Effect.RESULT,
    )
    video: str = _key(
        DEFAULT_VIDEO,
        "format of the video: h264, h265, av1 (.mp4), vp9 (.webm), prores, png (.mov) or ffv1 (.mkv)",
        Effect.RESULT,
        is_new=True,
    )
    crf: int | None = _key(
        None,
        "rate factor of h264, h265, av1 and vp9: smaller is better, and larger as a file; "
        "null: nearly lossless",
        Effect.RESULT,
        is_new=True,
    )
    audio: str | None = _key(
        None, "file whose sound is laid under the video", Effect.RESULT, is_new=True
    )
    metadata: bool = _key(
        True,
        "write the settings into the video file, from which from=FILE makes it again",
        Effect.RESULT,
        is_new=True,
    )

    preview: Any = _key(
        False,
        "picture of the unfinished video, NAME.preview.jpg: true after each step, N after every N "
        "steps",
        is_new=True,
    )

    def __post_init__(self) -> None:
        if self.name is not None:
            check_file_name("output.name", self.name)
        check_choice("output.video", self.video, tuple(VIDEO_FORMATS))
        self._check_crf()
        if not isinstance(self.preview, int) or self.preview < 0:
            raise InputError(
                f"output.preview={self.preview} must be true, false, or a number of steps, e.g. 5"
            )

    @property
    def preview_interval(self) -> int:
        """Steps from one preview to the next; 0 without previews."""
        return int(self.preview)

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a number of a decoded frame, as it leaves the device."""
        if self.save_tensor:
            return 4
        return 2 if self.format.bits > 8 else 1

    @property
    def format(self) -> VideoFormat:
        """Codec and container of videos."""
        return VIDEO_FORMATS[self.video]

    def _check_crf(self) -> None:
        """Raise InputError for a rate factor that the codec does not have."""
        if self.crf is None:
            return
        if self.format.default_crf is None:
            codecs = [name for name, item in VIDEO_FORMATS.items() if item.default_crf is not None]
            raise InputError(
                f"output.crf={self.crf}: {self.video} has no rate factor; {', '.join(codecs)} have one"
            )
        lowest, highest = self.format.crf_range
        if not lowest <= self.crf <= highest:
            raise InputError(
                f"output.crf={self.crf} must be {lowest} to {highest} for {self.video}; "
                f"the default is {self.format.default_crf}"
            )
